"""Settings as values: those of the program from its flags, and other ones for a running edge."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fumi_core.runtime.addresses import parse_address
from fumi_edge import cli
from fumi_edge.backends.dialing import Remote
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.connection.limits import ClientLimits
from fumi_edge.connection.policy import ListenerPolicy, ListenerSettings
from fumi_edge.edge import Edge
from fumi_edge.program.flags import Flags
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import Pair
from fumi_edge.tls.policy import CertificateSettings, Policy

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CERTIFICATES = CertificateSettings(())
"""What those of the test are known by."""


@contextlib.asynccontextmanager
async def backend(name: str) -> AsyncIterator[Remote]:
    """A server that greets with its name, and answers every line with it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(f"220 {name}\r\n".encode())
            while await reader.readline():
                writer.write(f"250 {name}\r\n".encode())
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Remote(parse_address(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))


def served_by(destination: Remote, policy: ListenerPolicy | None = None) -> EdgeSettings:
    address = parse_address("127.0.0.1:0")
    return EdgeSettings(
        certificates=CERTIFICATES,
        backends=BackendSettings((destination,), proxy_protocol="off", health_interval=0),
        listeners=tuple(ListenerSettings(address, starttls, policy or ListenerPolicy()) for starttls in (False, True)),
        drain_timeout=0,
    )


class Running:
    """An edge in this process, and clients of it."""

    def __init__(self, edge: Edge, cert: Path) -> None:
        self.edge = edge
        self._context = ssl.create_default_context(cafile=str(cert))

    async def tls(self) -> Client:
        return await self._open(False, ssl=self._context, server_hostname="localhost")

    async def starttls(self) -> Client:
        return await self._open(True)

    async def upgrade(self, client: Client) -> None:
        assert await ask(client, b"STARTTLS") == b"220 2.0.0 Ready to start TLS\r\n"
        await client[1].start_tls(self._context, server_hostname="localhost")

    async def _open(self, starttls: bool, **extra: object) -> Client:
        (listener,) = (each for each in self.edge.listeners if each.starttls is starttls)
        return await asyncio.open_connection("127.0.0.1", listener.address[1], **extra)  # type: ignore[arg-type]


async def ask(client: Client, command: bytes) -> bytes:
    client[1].write(command + b"\r\n")
    return await client[0].readline()


Scenario = Callable[[Running, Remote, Remote], Awaitable[None]]


@pytest.fixture
def run(certificate: tuple[Path, Path]) -> Callable[[Scenario], None]:
    """Runs a scenario with an edge whose backend is "one", and another backend "two"."""

    async def running(scenario: Scenario) -> None:
        cert, key = certificate
        async with backend("one") as one, backend("two") as two:
            edge = Edge(served_by(one), {CERTIFICATES: Certificates([Pair(str(cert), str(key))])})
            await edge.start()
            try:
                await scenario(Running(edge, cert), one, two)
            finally:
                await edge.close()

    return lambda scenario: asyncio.run(asyncio.wait_for(running(scenario), 30))


def test_an_open_connection_keeps_its_idle_timeout_and_backend_when_the_settings_change(run: Callable[[Scenario], None]) -> None:
    async def scenario(running: Running, one: Remote, two: Remote) -> None:
        before = await running.tls()
        assert await before[0].readline() == b"220 one\r\n"
        await running.edge.apply(served_by(two, ListenerPolicy(idle_timeout=0.2)))
        after = await running.tls()
        assert await after[0].readline() == b"220 two\r\n"
        up = running.edge.registry.get_sample_value
        assert (up("fumi_edge_backend_up", {"backend": one.name}), up("fumi_edge_backend_up", {"backend": two.name})) == (None, 1)
        assert await after[0].read() == b""  # idle
        assert await ask(before, b"NOOP") == b"250 one\r\n"

    run(scenario)


def test_a_client_that_upgrades_after_the_settings_have_changed_stays_with_its_backend(run: Callable[[Scenario], None]) -> None:
    async def scenario(running: Running, one: Remote, two: Remote) -> None:
        before = await running.starttls()
        assert await before[0].readline() == b"220 one\r\n"
        await running.edge.apply(served_by(two, ListenerPolicy(require_tls=True)))
        assert await ask(before, b"MAIL FROM:<>") == b"250 one\r\n"
        await running.upgrade(before)
        assert await ask(before, b"NOOP") == b"250 one\r\n"
        after = await running.starttls()
        assert await after[0].readline() == b"220 two\r\n"
        assert await ask(after, b"MAIL FROM:<>") == b"530 5.7.0 Must issue a STARTTLS command first\r\n"

    run(scenario)


def test_a_new_limit_counts_the_clients_that_are_already_connected(run: Callable[[Scenario], None]) -> None:
    async def scenario(running: Running, one: Remote, two: Remote) -> None:
        before = await running.starttls()
        assert await before[0].readline() == b"220 one\r\n"
        limited = replace(served_by(one), limits=ClientLimits(max_clients=1))
        await running.edge.apply(limited)
        rejected = await running.starttls()
        assert await rejected[0].readline() == b"421 4.7.0 Too many connections, try again later\r\n"
        before[1].close()
        await before[1].wait_closed()
        greeting = b""
        while not greeting.startswith(b"220"):  # the edge may not have seen the close yet
            after = await running.starttls()
            greeting = await after[0].readline()

    run(scenario)


def test_a_new_listener_policy_does_not_change_the_other_listener(run: Callable[[Scenario], None]) -> None:
    async def scenario(running: Running, one: Remote, two: Remote) -> None:
        settings = served_by(one)
        tls, starttls = settings.listeners
        changed = replace(starttls, policy=ListenerPolicy(idle_timeout=0.2))
        await running.edge.apply(replace(settings, listeners=(tls, changed)))
        quiet = await running.tls()
        assert await quiet[0].readline() == b"220 one\r\n"
        idle = await running.starttls()
        assert await idle[0].readline() == b"220 one\r\n"
        assert await idle[0].readline() == b"421 4.4.2 Error: timeout exceeded\r\n"
        assert await ask(quiet, b"NOOP") == b"250 one\r\n"

    run(scenario)


def test_the_ciphers_of_a_new_policy_have_series(run: Callable[[Scenario], None], certificate: tuple[Path, Path]) -> None:
    async def scenario(running: Running, one: Remote, two: Remote) -> None:
        cert, key = certificate
        wanted = CertificateSettings((Pair(str(cert), str(key)),), Policy(ciphers="ECDHE+AESCCM"))
        certificates = Certificates(*wanted)
        await running.edge.apply(replace(served_by(one), certificates=wanted), {wanted: certificates})
        for version, cipher in certificates.ciphers():
            labels = {"version": version, "cipher": cipher, "resumed": "false"}
            assert running.edge.registry.get_sample_value("fumi_edge_tls_sessions_total", labels) == 0

    run(scenario)


def test_a_worker_that_is_forked_after_a_change_has_the_new_policy(certificate: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        cert, key = certificate
        async with backend("one") as one:
            edge = Edge(served_by(one), {CERTIFICATES: Certificates([Pair(str(cert), str(key))])})
            edge.bind()
            await edge.apply(served_by(one, ListenerPolicy(require_tls=True)))  # in the master, which never starts
            await edge.start()
            try:
                client = await Running(edge, cert).starttls()
                assert await client[0].readline() == b"220 one\r\n"
                assert await ask(client, b"MAIL FROM:<>") == b"530 5.7.0 Must issue a STARTTLS command first\r\n"
            finally:
                await edge.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_the_program_declares_the_type_of_each_of_its_flags() -> None:
    named = {parameter.name for parameter in cli.main.params if parameter.expose_value}
    assert named == set(Flags.__annotations__)
