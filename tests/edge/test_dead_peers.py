"""A connection whose peer vanishes is ended after half a minute: what tests/core/test_dead_peers.py shows, of the edge's two."""

from __future__ import annotations

import asyncio
import socket

from fumi_core.runtime.addresses import parse_address
from fumi_edge.backends.dialing import Remote


def test_a_connection_to_a_backend_detects_that_it_has_vanished() -> None:
    async def connected() -> None:
        with socket.create_server(("127.0.0.1", 0)) as backend:
            remote = Remote(parse_address(f"127.0.0.1:{backend.getsockname()[1]}"))
            with await remote.connect(asyncio.get_running_loop(), 60, b"") as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10

    asyncio.run(connected())
