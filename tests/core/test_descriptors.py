"""Clients that use up the descriptors wait to be accepted, and those that are connected can still send mail."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack
from typing import Any

ENOUGH = 64


def test_a_flood_of_connections_leaves_descriptors_for_the_messages_of_connected_clients(
    start: Any, free_port: Any, connect: Any, eventually: Any
) -> None:
    port = free_port()
    program = start("--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off")
    client = connect(port)
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (ENOUGH, most))
    with ExitStack() as flood:
        for _ in range(2 * ENOUGH):
            flood.enter_context(socket.create_connection(("127.0.0.1", port)))
        eventually(lambda: "cannot accept, pausing" in program.log.read_text())
        client.envelope()
        client.say("DATA")
        assert client.say("Subject: hi\r\n\r\nhi\r\n.").startswith(b"250 2.0.0 Ok: queued")
    eventually(lambda: connect(port).banner.startswith(b"220"))
    assert program.log.read_text().count("cannot accept, pausing") == 1
