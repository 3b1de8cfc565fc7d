"""That the instruments tell the truth: clocks, headers, digests, replies. No peer runs here."""

import io
import socket
import subprocess
import sys
import threading

import pytest

from fumi_core import Fumi
from fumi_core.testing import running
from tests.support.waiting import PATIENCE

from . import backend, blocks, client, measures, processes

BUSY = "import os, sys, time, threading\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
SHOW_AND_WAIT = "\nprint(flush=True)\nsys.stdin.read()"

V2 = backend.SIGNATURE + b"\x21\x11"
ADDRESSES = bytes([192, 0, 2, 1, 127, 0, 0, 1]) + (12345).to_bytes(2, "big") + (25).to_bytes(2, "big")
SSL_TLV = b"\x20\x00\x08\x01" + bytes(4) + b"\x21\x00\x00"
OTHER_TLV = b"\x05\x00\x02id"


@pytest.mark.parametrize(
    "program",
    [
        BUSY,
        f"import threading; t = threading.Thread(target=exec, args=({BUSY!r}, {{}})); t.start(); t.join(); import sys",
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}], check=True)",
        f"import os, sys\nif os.fork(): os.wait(); os._exit(0)\n{BUSY}",
    ],
    ids=["itself", "a thread that ended", "a child that ended", "a child that lives"],
)
def test_all_the_cpu_that_a_server_takes_is_counted(program: str) -> None:
    argv, pipe = [sys.executable, "-c", program + SHOW_AND_WAIT], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        process.stdout.readline()
        taken = processes.cpu_ns([process.pid])
    # Starting an interpreter is counted too.
    assert taken > 0.19e9


def header_of(data: bytes) -> backend.Header:
    """What the backend reads from this."""
    return backend.read_header(io.BytesIO(data))


@pytest.mark.parametrize(
    ("tlvs", "tls"), [(b"", "0"), (OTHER_TLV, "0"), (SSL_TLV, "1"), (OTHER_TLV + SSL_TLV, "1"), (SSL_TLV + OTHER_TLV, "1")]
)
def test_the_backend_reads_a_v2_header(tlvs: bytes, tls: str) -> None:
    payload = ADDRESSES + tlvs
    header = V2 + len(payload).to_bytes(2, "big") + payload
    assert header_of(header + b"EHLO") == ("v2", "192.0.2.1", 12345, tls)


def test_the_backend_reads_a_v1_header() -> None:
    assert header_of(b"PROXY TCP4 192.0.2.1 127.0.0.1 12345 25\r\nEHLO") == ("v1", "192.0.2.1", 12345, "-")


@pytest.mark.parametrize("data", [b"", b"EHLO localhost\r\nMAIL", V2[:-1] + b"\x21\x00\x00"])
def test_the_backend_rejects_connections_without_a_header(data: bytes) -> None:
    with pytest.raises(backend.BadHeader):
        header_of(data)


def test_a_connection_counts_only_with_its_own_port_in_the_banner() -> None:
    client.expect_delivered("220 v2 127.0.0.1 12345 1\r\n", 12345)
    client.expect_delivered("220 v1 127.0.0.1 12345 -\r\n", 12345)
    for banner in ("", "220 v2 127.0.0.1 12346 1\r\n", "220 v2 127.0.0.1 12345 0\r\n", "421 4.3.2 no\r\n"):
        with pytest.raises(client.Refused):
            client.expect_delivered(banner, 12345)


def test_a_message_whose_reply_is_another_fails_the_session() -> None:
    ours, theirs = socket.socketpair()
    replies = b"220 hello\r\n250-hello\r\n250 HELP\r\n250 ok\r\n250 ok\r\n354 go on\r\n451 4.3.0 later\r\n"
    with theirs:
        theirs.sendall(replies)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(client.Refused, match="451"):
            client.send_messages(ours, 1, client.body(1024))


def test_a_message_has_the_requested_size_and_ends_with_a_dot() -> None:
    message = client.body(5_000_000)
    assert message.endswith(b"\r\n.\r\n")
    assert 0 <= 5_000_000 - (len(message) - 3) < len(client.LINE)


def test_the_digest_finds_a_piece_that_is_missing_or_out_of_order() -> None:
    first, second = blocks.blocks(2)
    for data in (first + second[:-1], second + first, first + first):
        assert backend.digest_of(io.BufferedReader(io.BytesIO(data)), 2 * blocks.BLOCK) != blocks.digest(2)
    assert backend.digest_of(io.BufferedReader(io.BytesIO(first + second)), 2 * blocks.BLOCK) == blocks.digest(2)


def test_the_backend_greets_each_client_by_its_header() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=backend.serve, args=(listener.dup(), backend.greet, None), daemon=True).start()
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 12345 25\r\n")
            assert connection.recv(1024) == b"220 v1 192.0.2.1 12345 -\r\n"


def test_growth_is_what_a_server_keeps_of_all_loads_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(measures, "resident_kib", lambda pids: 50_000 + 4_000 * len(done))
    growth = measures.Growth(lambda port, units: done.append(units), units=40, slice=10)
    server = processes.Server(0, (1,))
    growth.warm_up(server)
    assert growth(server) == 12_000
    assert done == [10] * 4


def test_messages_use_as_many_connections_as_requested() -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    sessions: list[str] = []
    app.on_connect(lambda ctx, next: sessions.append(ctx.session.id))
    with running(app) as server:
        client.send_over(server.port, False, 3, 2, client.body(100))
        assert [message.session.id for message in server.messages] == [session for session in sessions for _ in range(2)]
    assert len(sessions) == 3
