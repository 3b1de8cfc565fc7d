"""What the tests of the core share."""

from __future__ import annotations

import smtplib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fumi_core.proxy_protocol import ProxyHeader
from tests.core import scripted_milter as milters
from tests.core.client import Client, Connect, ConnectFrom, Send
from tests.core.dovecot_server import DovecotServer, Peer, StartDovecot
from tests.core.programs import Program, Start
from tests.core.scripted_hop import Answer, ScriptedHop, StartHop
from tests.core.scripted_milter import ScriptedMilter, StartMilter
from tests.support.clock import Clock
from tests.support.waiting import until


@pytest.fixture
def connect() -> Iterator[Connect]:
    clients: list[Client] = []

    def make(port: int, first: bytes = b"", banner: bool = True) -> Client:
        clients.append(Client(port, first, banner))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def connect_from(connect: Connect) -> ConnectFrom:
    """A client with an address of one's choice, for an app with ``proxy_protocol="required"``."""

    def make(port: int, address: str) -> Client:
        kind = "TCP6" if ":" in address else "TCP4"
        return connect(port, ProxyHeader(2, "PROXY", kind, (address, 1234), (address, 25)).to_bytes())

    return make


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def send() -> Send:
    def function(port: int, text: str, *recipients: str) -> dict[str, tuple[int, bytes]]:
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as smtp:
            return smtp.sendmail("a@b.example", recipients or ["c@d.example"], text)

    return function


@pytest.fixture
def scripted_hop() -> Iterator[StartHop]:
    hops: list[ScriptedHop] = []

    def make(path: str | None = None, /, **answers: Answer) -> ScriptedHop:
        hops.append(ScriptedHop(path, **answers))
        return hops[-1]

    yield make
    for hop in hops:
        hop.close()


@pytest.fixture
def dovecot() -> Iterator[StartDovecot]:
    servers: list[DovecotServer] = []

    def make(serve: Callable[[Peer], object], port: int = 0) -> DovecotServer:
        servers.append(DovecotServer(serve, port))
        return servers[-1]

    yield make
    for server in servers:
        server.close()
    assert [error for server in servers for error in server.errors] == []


@pytest.fixture
def scripted_milter() -> Iterator[StartMilter]:
    made: list[ScriptedMilter] = []

    def make(path: str | None = None, /, **answers: milters.Answer) -> ScriptedMilter:
        made.append(ScriptedMilter(path, **answers))
        return made[-1]

    yield make
    for milter in made:
        milter.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    programs: list[Program] = []

    def run(*flags: str, environment: dict[str, str] | None = None, wait: str = "listening") -> Program:
        programs.append(program := Program(tmp_path, *flags, environment=environment))
        until(lambda: wait in program.log.read_text() or program.process.poll() is not None)
        # One that was told to stop may have ended by now, but not in any other way.
        assert program.process.poll() in ((None, 0) if wait == "stopping" else (None,)), program.log.read_text()
        return program

    yield run
    for program in programs:
        program.close()
