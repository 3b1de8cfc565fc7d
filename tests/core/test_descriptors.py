"""Clients that use up the descriptors wait to be accepted, and those that are connected can still send mail."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack

from tests.core.client import Connect
from tests.core.programs import Start
from tests.support.ports import free_port
from tests.support.waiting import until

ENOUGH = 64


def test_a_flood_of_connections_leaves_descriptors_for_the_messages_of_connected_clients(start: Start, connect: Connect) -> None:
    port = free_port()
    program = start("--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off")
    client = connect(port)
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (ENOUGH, most))
    with ExitStack() as flood:
        for _ in range(2 * ENOUGH):
            flood.enter_context(socket.create_connection(("127.0.0.1", port)))
        until(lambda: "cannot accept, pausing" in program.log.read_text())
        client.envelope()
        client.say("DATA")
        assert client.say("Subject: hi\r\n\r\nhi\r\n.").startswith(b"250 2.0.0 Ok: queued")
    until(lambda: connect(port).banner.startswith(b"220"))
    assert program.log.read_text().count("cannot accept, pausing") == 1
