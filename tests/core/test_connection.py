"""A connection on a transport of another kind: it needs the facts about its client, and no socket."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

from fumi_core import ConnectContext, DataContext, Fumi, Next, TLSInfo
from fumi_core.proxy_protocol import ProxyHeader, tls_tlvs
from fumi_core.runtime.scoreboard import count_of_one_process
from fumi_core.server.client_facts import ClientFacts, Origin, from_header
from fumi_core.server.connection import Connection
from fumi_core.server.dialogue import Dialogue
from fumi_core.server.listeners import Server
from fumi_core.server.transport import Transport, TransportOwner
from fumi_core.smtp.session import Session

TLS = TLSInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", sni="mx.example")
FACTS = ClientFacts(("192.0.2.1", 4321), ("198.51.100.2", 465), secure=True, tls=TLS, id="4f1d")


class InMemory:
    """A transport that keeps what is written. ``room`` is False while the client does not read."""

    def __init__(self, owner: TransportOwner) -> None:
        self.owner = owner
        self.sent = b""
        self.calls: list[str] = []
        self.room = True

    @property
    def blocked(self) -> bool:
        return not self.room

    def write(self, data: bytes) -> None:
        self.sent += data

    def write_eof(self) -> None:
        self.calls.append("write_eof")

    def pause_reading(self) -> None:
        self.calls.append("pause_reading")

    def resume_reading(self) -> None:
        self.calls.append("resume_reading")

    def check_window(self) -> None:
        pass

    def close(self) -> None:
        self._end("close")

    def abort(self) -> None:
        self._end("abort")

    def _end(self, call: str) -> None:
        self.calls.append(call)
        asyncio.get_running_loop().call_soon(self.owner.lost)


def serving(app: Fumi, talk: Callable[[Connection, InMemory], None], facts: ClientFacts = FACTS) -> InMemory:
    """Begin a connection with these facts, ``talk``, and return its transport when the connection has ended."""

    async def run() -> InMemory:
        server = Server(app._dialogue_setup(), None, count_of_one_process())
        connection = Connection(server, facts)
        transport = InMemory(connection)
        seam: Transport = transport
        connection.start(seam)
        talk(connection, transport)
        async with asyncio.timeout(10):
            await server._wait_empty()
        return transport

    return asyncio.run(run())


def test_a_dialogue_begins_with_facts_given_as_values() -> None:
    app = Fumi(auth_optional=True, name="mx.example")
    seen: list[object] = []

    @app.on_connect
    async def look(ctx: ConnectContext, next: Next) -> None:
        session = ctx.session
        seen.append((session.id, session.remote_address, session.remote_port, session.local_address, session.local_port))
        seen.append((session.secure, session.tls, session.proxy_address))
        await next()

    def talk(connection: Connection, transport: InMemory) -> None:
        connection.received(b"EHLO client.example\r\nQUIT\r\n")

    transport = serving(app, talk)
    assert seen == [("4f1d", "192.0.2.1", 4321, "198.51.100.2", 465), (True, TLS, None)]
    assert transport.sent.startswith(b"220 mx.example")
    assert b"250-REQUIRETLS\r\n" in transport.sent
    assert transport.sent.endswith(b"221 2.0.0 Bye\r\n")
    assert transport.calls == ["close"]


def test_replies_wait_while_the_transport_is_blocked() -> None:
    def talk(connection: Connection, transport: InMemory) -> None:
        transport.room = False
        connection.received(b"EHLO client.example\r\n")
        assert transport.sent.count(b"\r\n") == 1, "something was written to a client that does not read"
        assert transport.calls == ["pause_reading"]
        transport.room = True
        connection.drained()
        assert b"250-PIPELINING\r\n" in transport.sent
        assert transport.calls == ["pause_reading", "resume_reading"]
        connection.ended()

    assert serving(Fumi(auth_optional=True), talk).calls[-1] == "close"


def test_reading_pauses_when_the_reply_to_a_single_command_waits() -> None:
    def talk(connection: Connection, transport: InMemory) -> None:
        connection.received(b"EHLO client.example\r\n")
        transport.room = False
        connection.received(b"NOOP\r\n")
        assert transport.calls == ["pause_reading"]
        transport.room = True
        connection.drained()
        assert transport.calls == ["pause_reading", "resume_reading"]
        connection.ended()

    assert serving(Fumi(auth_optional=True), talk).sent.endswith(b"250 2.0.0 Ok\r\n")


def test_a_draining_connection_answers_the_command_that_ends_the_transaction_and_then_closes() -> None:
    def talk(connection: Connection, transport: InMemory) -> None:
        connection.received(b"EHLO client.example\r\n")
        connection.received(b"MAIL FROM:<a@b.example>\r\n")
        connection.drain()
        connection.received(b"RSET\r\n")
        connection.received(b"NOOP\r\n")
        connection.ended()

    sent = serving(Fumi(auth_optional=True), talk).sent
    assert sent.endswith(b"250 2.1.0 Ok\r\n250 2.0.0 Ok\r\n421 4.3.2 Service shutting down, closing connection\r\n")


def test_neither_a_message_nor_a_connection_leaves_anything_to_the_garbage_collector() -> None:
    app = Fumi(auth_optional=True)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.stream.tap(lambda piece: ctx.size_exceeded)
        await ctx.stream.skip()

    def left(*kinds: type) -> list[object]:
        return [each for each in gc.get_objects() if isinstance(each, kinds)]

    def talk(connection: Connection, transport: InMemory) -> None:
        connection.received(b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
        connection.received(b"hi\r\n.\r\n")
        assert left(DataContext) == []
        connection.received(b"QUIT\r\n")

    gc.collect()
    gc.disable()
    try:
        del serving(app, talk).owner
        assert left(Connection, Dialogue, Session) == []
    finally:
        gc.enable()


def test_a_client_that_upgraded_gets_no_second_banner() -> None:
    def talk(connection: Connection, transport: InMemory) -> None:
        assert transport.sent == b""
        connection.received(b"EHLO client.example\r\nQUIT\r\n")

    transport = serving(Fumi(auth_optional=True, name="mx.example"), talk, FACTS._replace(greeted=True))
    assert transport.sent.startswith(b"250-mx.example")
    assert transport.calls == ["close"]


def test_a_client_that_upgraded_and_is_rejected_then_gets_the_rejection_as_the_reply_to_its_first_command() -> None:
    app = Fumi(auth_optional=True)

    @app.on_connect
    async def reject(ctx: ConnectContext, next: Next) -> None:
        ctx.reject("5.7.1 Not from there", 554)

    def talk(connection: Connection, transport: InMemory) -> None:
        assert transport.sent == b""
        connection.received(b"EHLO client.exam")
        assert transport.sent == b""
        connection.received(b"ple\r\nMAIL FROM:<a@client.example>\r\n")
        connection.ended()

    transport = serving(app, talk, FACTS._replace(greeted=True))
    assert transport.sent == b"554 5.7.1 Not from there\r\n"
    assert transport.calls == ["write_eof", "close"]


def test_xclient_restarts_at_the_banner_after_an_upgrade_too() -> None:
    def talk(connection: Connection, transport: InMemory) -> None:
        connection.received(b"EHLO proxy.example\r\nXCLIENT ADDR=192.0.2.9\r\nQUIT\r\n")

    app = Fumi(auth_optional=True, name="mx.example", use_xclient=True, trusted_proxies=("192.0.2.1",))
    transport = serving(app, talk, FACTS._replace(greeted=True))
    assert [line[:4] for line in transport.sent.splitlines() if line[3:4] == b" "] == [b"250 ", b"220 ", b"221 "]


def test_a_header_and_values_lead_to_the_same_facts() -> None:
    connection = ClientFacts(("127.0.0.1", 50000), ("127.0.0.1", 2525))
    header = ProxyHeader(2, "PROXY", "TCP4", FACTS.remote, FACTS.local, ((5, b"4f1d"), *tls_tlvs(TLS)))
    assert from_header(header, connection) == FACTS._replace(proxy_address="127.0.0.1")


def test_without_addresses_in_the_header_the_connections_own_count() -> None:
    connection = ClientFacts(("127.0.0.1", 50000), ("127.0.0.1", 2525))
    unknown = from_header(ProxyHeader(2, "PROXY"), connection)
    local = from_header(ProxyHeader(2, "LOCAL"), connection)
    assert (unknown.remote, unknown.local, unknown.origin) == (connection.remote, connection.local, Origin.UNNAMED_CLIENT)
    assert (local.remote, local.local, local.origin) == (connection.remote, connection.local, Origin.HEALTH_CHECK)
