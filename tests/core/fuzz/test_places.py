"""A deadline in every state: whatever a client has sent and read, it keeps no place by doing next to nothing from then on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

from fumi_core import Fumi, Next
from fumi_core.proxy_protocol import ProxyHeader

from . import campaign, speech
from .passing import PassingLoop

SOCKET_TIMEOUT, DATA_TIMEOUT, PROXY_TIMEOUT, LINGER, SLOW = 30.0, 60.0, 5.0, 5.0, 7.0
LONGEST = SOCKET_TIMEOUT + DATA_TIMEOUT + LINGER + 4 * SLOW
"""Virtual seconds in which a client that does next to nothing must be gone: its last command's handlers take their time."""
HEADER = ProxyHeader(2, "PROXY", "TCP4", ("192.0.2.1", 1), ("192.0.2.2", 25)).to_bytes()


@dataclass(frozen=True)
class Place(campaign.Case):
    """What a client says, and how it goes on when it has said it."""

    lmtp: bool
    proxied: bool

    def check(self) -> None:
        loop = PassingLoop()
        try:
            with (
                mock.patch("fumi_core.server.connection.monotonic", loop.time),
                mock.patch("fumi_core.server.connection.LINGER_SECONDS", LINGER),
                mock.patch("fumi_core.server.dialogue.time.monotonic", loop.time),
            ):
                loop.run_until_complete(self._live(loop))
        finally:
            loop.close()

    async def _live(self, loop: PassingLoop) -> None:
        chance = Random(self.cut)
        talking = asyncio.Event()
        talking.set()
        app = _app(self, chance, talking)
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        await app.listen(sock=listening)
        server = app._server
        assert server is not None
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
            client.setblocking(False)
            await loop.sock_connect(client, listening.getsockname())
            await _until(lambda: bool(server.connections))
            await _talk(chance, client, (HEADER if self.proxied else b"") + self.data)
            talking.clear()
            reads, drips = chance.random() < 0.5, chance.choice((b"", b"", b"x", b"\0"))
            if chance.random() < 0.4:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_WR)
            began = loop.time()
            while server.connections:
                assert loop.time() - began < LONGEST, f"still there after {LONGEST} s: {_states(server)}"
                await asyncio.sleep(chance.uniform(0.1, 0.9) * PROXY_TIMEOUT)
                with contextlib.suppress(OSError):
                    client.send(drips)
                if reads:
                    with contextlib.suppress(OSError):
                        client.recv(1)
            assert app.connection_count.clients == app.connection_count.connections == 0
        await app.close()
        await asyncio.sleep(0.1)  # for the tasks of handlers to end


def _app(place: Place, chance: Random, talking: asyncio.Event) -> Fumi:
    """Its handlers take their time while the client talks; how long those of a long pipeline take is no matter of deadlines."""
    app = Fumi(
        auth_optional=True,
        size=100_000,
        max_errors=50,
        name="mx.example",
        socket_timeout=SOCKET_TIMEOUT,
        data_timeout=DATA_TIMEOUT,
        proxy_timeout=PROXY_TIMEOUT,
        close_timeout=0.0,
        lmtp=place.lmtp,
        proxy_protocol="required" if place.proxied else "off",
        allow_insecure_auth=True,
    )

    async def slow(ctx: object, next: Next) -> None:
        if talking.is_set() and chance.random() < 0.3:
            await asyncio.sleep(chance.random() * SLOW)
        await next()

    for add in (app.on_connect, app.on_auth, app.on_mail_from, app.on_rcpt_to, app.on_data, app.on_close):
        add(slow)
    return app


async def _talk(chance: Random, client: socket.socket, said: bytes) -> None:
    """Say it in pieces, as far as the server takes it; read now and then."""
    for piece in speech.cut(chance, said):
        with contextlib.suppress(OSError):
            client.send(piece)
        with contextlib.suppress(OSError):
            if chance.random() < 0.3:
                client.recv(4096)
        await asyncio.sleep(0 if chance.random() < 0.8 else chance.random() * SLOW)


async def _until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


def _states(server: Any) -> list[object]:
    return [
        (each._phase, each._transport.blocked, each._dialogue and each._dialogue.protocol.state) for each in server.connections
    ]


def place(chance: Random) -> Place:
    lmtp = chance.random() < 0.2
    said = speech.session(chance, b"LHLO x\r\n" if lmtp else b"EHLO x\r\n")
    if chance.random() < 0.3:
        said += b"EHLO x\r\n" * chance.choice((100, 1000, 5000))
    return Place(said, chance.randrange(1 << 30), lmtp, chance.random() < 0.3)


def test_no_client_keeps_its_place_by_doing_next_to_nothing() -> None:
    campaign.run("places", 1, place)
