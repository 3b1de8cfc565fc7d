"""A message that comes again, or a client or core that dies, while the next hop still answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fumi_core.delivery.next_hop import reply_memory
from fumi_core.testing import RunningServer
from tests.core.client import Connect
from tests.core.next_hop_joint.delivery import FULL, MIXED, TEXT, Front, MakeStore, Store, envelope, rows, send
from tests.core.programs import Start
from tests.support.ports import free_port
from tests.support.waiting import until

StartPrograms = Callable[[Store, int], list[int]]


@pytest.fixture
def programs(start: Start, tmp_path: Path) -> StartPrograms:
    """The ports of fumi-core processes that deliver to ``hop`` and share a state directory."""

    def run(hop: Store, count: int) -> list[int]:
        ports = [free_port() for _ in range(count)]
        for port in ports:
            listen = ["--proxy-protocol", "off", "--listen", f"127.0.0.1:{port}", "--name", "front.example"]
            start(
                *listen, "--deliver", f"lmtp:{hop.address}", "--state", str(tmp_path / "state"), wait=f"listener=127.0.0.1:{port}"
            )
        return ports

    return run


def test_a_core_that_is_killed_between_answers_has_remembered_those_that_came(
    store: MakeStore, start: Start, connect: Connect, tmp_path: Path
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def never() -> None:
        entered.set()
        go_on.wait(60)

    hop, port = store(c=never), free_port()
    flags = ["--proxy-protocol", "off", "--listen", f"127.0.0.1:{port}", "--deliver", f"lmtp:{hop.address}", "--workers", "2"]
    program = start(*flags)
    client = connect(port)
    envelope(client, "a", "b", "c", "d")
    client.say("DATA")
    client.sock.sendall(f"{TEXT}.\r\n".encode())
    assert entered.wait(60)
    until(lambda: rows(tmp_path / "state") == 2)
    program.close()
    assert client.reply() == b""
    go_on.set()
    hop.answers.clear()
    start(*flags)
    assert send(connect(port), "a", "b", "c", "d").startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys("abcd", 1)
    until(lambda: rows(tmp_path / "state") == 0)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("again", [("good",), ("good", "other")])
def test_the_same_message_waits_while_it_is_being_delivered(
    store: MakeStore, programs: StartPrograms, connect: Connect, processes: int, again: tuple[str, ...]
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        go_on.wait(60)
        return FULL

    hop = store(full=slow)
    ports = programs(hop, processes)
    first, second = connect(ports[0]), connect(ports[-1])
    for client, names in ((first, ("good", "full")), (second, again)):
        assert all(reply.startswith(b"250") for reply in envelope(client, *names))
        client.say("DATA")
        client.sock.sendall(f"{TEXT}.\r\n".encode())
        assert entered.wait(60)
    go_on.set()
    assert first.reply().startswith(MIXED)
    # If no answer was known at its MAIL, it was not kept, and the client has to send it once more.
    reply = second.reply()
    assert reply.startswith((b"250 ", b"451 4.2.0 "))
    if reply.startswith(b"451"):
        assert send(second, *again).startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys(again, 1)


def test_a_delivery_that_takes_too_long_defers_the_same_message(
    store: MakeStore, front: Front, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_memory, "OTHER_DELIVERY_TIMEOUT", 0.1)
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        go_on.wait(60)
        return "250 2.0.0 Saved"

    hop = store(slow=slow)
    server = front(hop)
    first, second = connect(server.port), connect(server.port)
    envelope(first, "good", "slow")
    first.say("DATA")
    first.sock.sendall(f"{TEXT}.\r\n".encode())
    assert entered.wait(60)
    assert send(second, "good", "slow") == b"451 4.2.0 This message is being delivered, try again later\r\n"
    go_on.set()
    assert first.reply().startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1, "slow": 1}


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_a_client_that_disconnects_before_its_250_gets_it_the_next_time(
    store: MakeStore, front: Front, connect: Connect, tmp_path: Path, names: tuple[str, ...]
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        go_on.wait(60)
        return "250 2.0.0 Saved"

    hop = store(a=slow)
    server = front(hop)
    client = connect(server.port)
    envelope(client, *names)
    client.say("DATA")
    client.sock.sendall(f"{TEXT}.\r\n".encode())
    assert entered.wait(60)
    client.reset()
    until(lambda: gone(server))
    go_on.set()
    until(lambda: rows(tmp_path / "state") == len(names))
    assert send(connect(server.port), *names).startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys(names, 1)


def connections(server: RunningServer) -> int:
    """How many are open."""
    assert server.app._server is not None
    return len(server.app._server.connections)


def gone(server: RunningServer) -> bool:
    """Whether the server has noticed that its client has disconnected."""
    (connection,) = server.app._server.connections  # type: ignore[union-attr]
    dialogue = connection._dialogue
    return dialogue is not None and dialogue.closed


def test_a_client_that_gives_up_the_second_time_changes_nothing(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store(slow="451 4.2.1 Later")
    server = front(hop)
    assert send(connect(server.port), "good", "slow").startswith(MIXED)
    client = connect(server.port)
    envelope(client, "good", "slow")
    client.say("DATA")
    client.sock.sendall(TEXT.encode())
    client.close()
    until(lambda: connections(server) == 1)
    del hop.answers["slow"]
    assert send(connect(server.port), "good", "slow").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1, "slow": 1}
