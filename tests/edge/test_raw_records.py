"""Records that no client sends: what came before them is delivered, and then the connection is cut off, or goes on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.edge.raw_tls import ALERT, CHANGE_CIPHER_SPEC, HANDSHAKE, RawClient
from tests.support.peer import Peer
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(sys.implementation.name != "cpython", reason="reaches into CPython's ssl module")

Records = Callable[[RawClient], bytes]

CLOSE_NOTIFY = b"\1\0"

HARMLESS: dict[str, Records] = {
    "padding": lambda client: client.record(b"", padding=5000),
    "a few records without content": lambda client: b"".join(client.record(b"") for _ in range(10)),
    "a few warnings": lambda client: b"".join(client.record(b"\1\x5a", ALERT) for _ in range(4)),
    "key updates": lambda client: b"".join(client.key_update(number % 2) for number in range(50)),
}
WRONG: dict[str, Records] = {
    "more content than a record may have": lambda client: client.record(bytes(16385)),
    "a record without a type": lambda client: client.record(b"", b"\0", padding=100),
    "an unknown type": lambda client: client.record(b"x", b"\x63"),
    "a heartbeat": lambda client: client.record(b"\1\xff\xffx", b"\x18"),
    "a record twice": lambda client: 2 * client.record(b""),
    "a changed record": lambda client: client.record(b"NOOP\r\n")[:-1] + b"x",
    "a length of 0": lambda client: b"\x17\3\3\0\0",
    "a length of 65535": lambda client: b"\x17\3\3\xff\xff" + bytes(65535),
    "many records without content": lambda client: b"".join(client.record(b"", padding=9) for _ in range(100)),
    "many warnings": lambda client: b"".join(client.record(b"\1\x5a", ALERT) for _ in range(6)),
    "an alert of one byte": lambda client: client.record(b"\1", ALERT),
    "an alert in plaintext": lambda client: b"\x15\3\3\0\2\1\0",
    "content in plaintext": lambda client: b"\x17\3\3\0\6NOOP\r\n",
    "SMTP in plaintext": lambda client: b"NOOP\r\n",
    "a change of the cipher": lambda client: b"\x14\3\3\0\1\1",
    "an encrypted change of the cipher": lambda client: client.record(b"\1", CHANGE_CIPHER_SPEC),
    "a key update that asks for nothing there is": lambda client: client.key_update(2),
    "a key update that is too long": lambda client: client.record(b"\x18\0\0\2\0\0", HANDSHAKE),
    "half of a key update": lambda client: client.record(b"\x18\0", HANDSHAKE) + client.record(b""),
    "two key updates in one record": lambda client: client.record(2 * b"\x18\0\0\1\0", HANDSHAKE),
    "content by the key before the update": lambda client: client.record(b"\x18\0\0\1\0", HANDSHAKE) + client.record(b"x"),
    "a handshake message of 16 MiB": lambda client: client.record(b"\x18\xff\xff\xff" + bytes(1000), HANDSHAKE),
    "an empty handshake message": lambda client: client.record(b"", HANDSHAKE),
    "a renegotiation": lambda client: client.record(b"\1\0\0\x29\3\3" + bytes(32) + b"\0\0\2\x13\2\1\0", HANDSHAKE),
    "a session ticket": lambda client: client.record(b"\4\0\0\x0e" + bytes(14), HANDSHAKE),
    "a certificate that nobody requested": lambda client: client.record(b"\x0b\0\0\4\0\0\0\0", HANDSHAKE),
    "a second Finished": lambda client: client.record(b"\x14\0\0\x30" + bytes(48), HANDSHAKE),
}
AFTER_THE_END: dict[str, Records] = {
    "content": lambda client: client.record(CLOSE_NOTIFY, ALERT) + client.record(b"NOOP\r\n"),
    "an error": lambda client: client.record(CLOSE_NOTIFY, ALERT) + client.record(b"\2\x50", ALERT),
    "plaintext": lambda client: client.record(CLOSE_NOTIFY, ALERT) + b"NOOP\r\n",
    "half a record": lambda client: client.record(CLOSE_NOTIFY, ALERT) + client.record(b"NOOP\r\n")[:10],
}


class Attack:
    """An edge, and what its backend receives."""

    def __init__(self, edge: StartEdge, backend: StartBackend, clients: Clients, secrets: Path) -> None:
        self._received: list[list[bytes]] = []
        self._program = edge(backend=backend(self._receive))
        self._clients, self._secrets = clients, secrets

    def _receive(self, peer: Peer) -> None:
        received: list[bytes] = []
        peer.say(b"220 hi\r\n")
        try:
            while line := peer.line():
                received.append(line)
            received.append(b"end")
        except ConnectionResetError:
            received.append(b"reset")
        self._received.append(received)

    def __call__(self, records: Records) -> tuple[list[bytes], str, str]:
        """Send NOOP, the records, RSET and close_notify.

        Returns the lines that the backend received, with its connection's end, the reason in the log, and what the client got.
        """
        number = len(self._received)
        peer = self._clients.plain(self._program.tls_port)
        client = RawClient(peer.sock, self._clients.context(), self._secrets)
        assert client.read() == b"220 hi\r\n"
        with contextlib.suppress(ConnectionError):  # cut off already
            client.send(
                client.record(b"NOOP\r\n"), records(client), client.record(b"RSET\r\n"), client.record(CLOSE_NOTIFY, ALERT)
            )
        try:
            got = "close_notify" if client.read() == b"" else "more"
        except OSError:
            got = "cut off"
        peer.close()
        until(lambda: len(self._received) > number, "the end of the backend's connection")
        return self._received[number], self._program.ended(number + 1)[number]["reason"], got


@pytest.fixture
def attack(edge: StartEdge, backend: StartBackend, clients: Clients, tmp_path: Path) -> Attack:
    return Attack(edge, backend, clients, tmp_path / "secrets")


def different(attack: Attack, cases: dict[str, Records], expected: tuple[list[bytes], str, str]) -> dict[str, object]:
    outcomes = {name: attack(records) for name, records in cases.items()}
    return {name: outcome for name, outcome in outcomes.items() if outcome != expected}


def test_records_that_mean_nothing_change_nothing(attack: Attack) -> None:
    whole = [b"NOOP\r\n", b"RSET\r\n", b"end"]
    assert different(attack, HARMLESS, (whole, "client_closed", "close_notify")) == {}


def test_after_a_record_that_is_wrong_nothing_is_delivered_and_the_backend_sees_a_reset(attack: Attack) -> None:
    assert different(attack, WRONG, ([b"NOOP\r\n", b"reset"], "client_reset", "cut off")) == {}


def log_of_wrong_records(program: Program, clients: Clients, secrets: Path) -> list[tuple[str, str]]:
    """Reason and error, as logged, of a client whose record is changed on the way, and of one that rejects the certificate."""

    def rejection(client: RawClient) -> bytes:
        return client.record(b"\2\x2e", ALERT)

    for number, records in enumerate((WRONG["a changed record"], rejection)):
        peer = clients.plain(program.tls_port)
        client = RawClient(peer.sock, clients.context(), secrets)
        client.read()
        client.send(records(client))
        program.ended(number + 1)
        peer.close()
    return [(each["reason"], each["error"]) for each in program.ended(2)]


LOGGED = [("client_reset", "decryption failed or bad record mac"), ("client_reset", "sslv3 alert certificate unknown")]


def test_what_is_wrong_with_a_record_is_in_the_log(
    edge: StartEdge, backend: StartBackend, clients: Clients, tmp_path: Path
) -> None:
    def greet(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        with contextlib.suppress(ConnectionError):
            peer.line()

    assert log_of_wrong_records(edge(backend=backend(greet)), clients, tmp_path / "secrets") == LOGGED


def test_an_app_in_the_edge_has_the_same_log(clients: Clients, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "myapp.py").write_text("from fumi_core import Fumi\napp = Fumi(auth_optional=True)\n")
    addresses = ("--listen", "127.0.0.1:0", "--starttls-listen", "127.0.0.1:0")
    program = Program("--cert", str(certificate[0]), "--key", str(certificate[1]), *addresses, "myapp:app", cwd=tmp_path)
    try:
        assert log_of_wrong_records(program, clients, tmp_path / "secrets") == LOGGED
    finally:
        program.stop()


def test_after_close_notify_nothing_is_delivered_whatever_it_is(attack: Attack) -> None:
    assert different(attack, AFTER_THE_END, ([b"NOOP\r\n", b"end"], "client_closed", "close_notify")) == {}
