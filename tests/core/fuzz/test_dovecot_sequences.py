"""Many logins, and a Dovecot that is slow, dies, reads nothing or answers too late: each gets the answer to itself or none."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, cast
from unittest import mock

from fumi_core.errors import SMTPError
from fumi_core.plugins.dovecot import channel
from fumi_core.plugins.dovecot.auth import _request, user_of
from fumi_core.plugins.dovecot.channel import Channel, Link, Unavailable
from fumi_core.plugins.dovecot.protocol import AuthConversation
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Session
from tests.core.dovecot_server import AUTH_HANDSHAKE

from . import campaign, speech
from .passing import run_passing

DELAYS = (0.0, 0.0, 0.0, 2.0, 20.0, 40.0)
"""Seconds until an answer; the time limit is 30."""


class Server:
    """Answers by chance, and keeps the logins that it has accepted and refused."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.accepted: set[str] = set()
        self.refused: set[str] = set()
        self.transports: list[Transport] = []

    async def open(self, make: Callable[[], Link], address: SocketAddress, seconds: float) -> Link:
        await asyncio.sleep(self.chance.choice((0, 0, 1)))
        if self.chance.random() < 0.1:
            raise ConnectionRefusedError
        link = make()
        self.transports.append(transport := Transport(link, self))
        link.connection_made(cast(asyncio.Transport, transport))
        transport.later(self.chance.choice((0.0, 0.0, 0.0, 1.0, 10.0)), AUTH_HANDSHAKE.encode())
        if self.chance.random() < 0.3:
            asyncio.get_running_loop().call_later(self.chance.choice((1, 15, 50)), transport.end)
        if self.chance.random() < 0.3:
            asyncio.get_running_loop().call_later(self.chance.choice((1, 15)), transport.read_nothing)
        return link


class Transport:
    """One connection of the server."""

    def __init__(self, link: Link, server: Server) -> None:
        self._link = link
        self._server = server
        self.closed = self._full = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        for each in data.splitlines():
            verb, *fields = each.split(b"\t")
            if verb == b"AUTH":
                assert not self._full, "a request to a server that reads nothing"
                self._answer(fields[0], b64decode(fields[-1].removeprefix(b"resp=")).split(b"\0")[1].decode())

    def _answer(self, number: bytes, user: str) -> None:
        chance, loop = self._server.chance, asyncio.get_running_loop()
        kind, delay = chance.random(), chance.choice(DELAYS) + 0.001
        if kind < 0.5:
            loop.call_later(delay, self._server.accepted.add, user)
            self.later(delay + 0.001, b"OK\t%b\tuser=%b\n" % (number, user.encode()))
        elif kind < 0.7:
            loop.call_later(delay, self._server.refused.add, user)
            self.later(delay + 0.001, b"FAIL\t%b\tuser=%b\n" % (number, user.encode()))
        elif kind < 0.8:
            self.later(delay, b"FAIL\t%b\tuser=%b\ttemp\n" % (number, user.encode()))
        elif kind < 0.85:
            self.later(delay, b"O")

    def later(self, delay: float, data: bytes) -> None:
        asyncio.get_running_loop().call_later(delay, self._arrive, data)

    def _arrive(self, data: bytes) -> None:
        for piece in speech.cut(self._server.chance, data):
            if piece and not self.closed:
                self._link.data_received(piece)

    def read_nothing(self) -> None:
        if not self.closed:
            self._full = True
            self._link.pause_writing()
            asyncio.get_running_loop().call_later(self._server.chance.choice((5, 60)), self._read_on)

    def _read_on(self) -> None:
        if not self.closed:
            self._full = False
            self._link.resume_writing()

    def end(self) -> None:
        if not self.closed:
            self.closed = True
            self._link.connection_lost(None)

    def abort(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Logins(campaign.Case):
    """``data`` and ``cut`` are seeds, of the server and of the clients."""

    def check(self) -> None:
        run_passing(self._run())

    async def _run(self) -> None:
        server, chance = Server(Random(self.data)), Random(self.cut)
        logins = Channel(SocketAddress("unix", path="/run/dovecot"), AuthConversation)
        with mock.patch.object(channel, "open_connection", server.open), mock.patch.object(channel, "event"):
            clients = [asyncio.create_task(self._client(logins, server, f"user{number}", chance)) for number in range(12)]
            await asyncio.wait(clients)
        for each in clients:
            if not each.cancelled():
                each.result()
        await asyncio.sleep(60)
        assert len(asyncio.all_tasks()) == 1, "a task that waits for ever"
        logins.close()
        assert all(each.closed for each in server.transports)

    async def _client(self, logins: Channel, server: Server, user: str, chance: Random) -> None:
        await asyncio.sleep(chance.choice((0, 0, 1, 10, 45, 90)))
        login = asyncio.create_task(_log_in(logins, user))
        begun = asyncio.get_running_loop().time()
        if chance.random() < 0.2:
            await asyncio.wait([login], timeout=chance.choice((0, 0.5, 20)))
            login.cancel()
        await asyncio.wait([login])
        assert asyncio.get_running_loop().time() - begun < 30.1, "a login that waits for too long"
        if login.cancelled():
            return
        found = login.result()
        assert found in (user, "535", "454"), found
        assert found != user or user in server.accepted, "a login that nobody accepted"
        assert found != "535" or user in server.refused, "a login that nobody refused"


async def _log_in(logins: Channel, user: str) -> str:
    credentials: Any = Credentials("PLAIN", user, "secret")
    try:
        return user_of(await logins.request(lambda server: _request(Session("1", "mx.example"), credentials, server)))
    except Unavailable:
        return "454"
    except SMTPError as error:
        return str(error.code)


def logins(chance: Random) -> Logins:
    return Logins(chance.randbytes(8), chance.randrange(1 << 30))


def test_each_login_gets_the_answer_to_itself_or_none() -> None:
    campaign.run("dovecot-sequences", 1, logins)
