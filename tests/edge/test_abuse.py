"""What a hostile review broke: clients, backends and operators at their worst, each with the fault it once found."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import random
import resource
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
import time

import pytest

import fumi_edge.connection.tunnel
from fumi_edge.tls.close_notify import CloseNotify
from tests.starter import finished

READY = [b"220 2.0.0 Ready to start TLS\r\n"]


def run(*flags):
    """Run to the end; (status, lines of stderr but for the usage hint)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FUMI_")}
    done = finished("fumi-edge", *flags, env=clean)
    return done.returncode, [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]


def waiting(sock, what=termios.FIONREAD):
    """Bytes received and not read yet; with TIOCOUTQ, those sent that the other side has not read."""
    return struct.unpack("i", fcntl.ioctl(sock, what, b"\0\0\0\0"))[0]


def settled(measure, program):
    """Poll until the measure has not changed for a while, the program being idle, and return it: nobody moves any more."""
    value, since = measure(), time.monotonic()
    deadline = since + 20
    while time.monotonic() - since < 0.15 and time.monotonic() < deadline:
        time.sleep(0.01)
        if (now := measure()) != value or not program.rests():
            value, since = now, time.monotonic()
    return value


class Engine:
    """A client's TLS apart from its socket: after the handshake, what it has to send stays in it until ``flush()``."""

    def __init__(self, sock, context):
        self.sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self.flush()
                self._in.write(sock.recv(65536))

    def flush(self):
        self.sock.sendall(self._out.read())

    def write(self, data):
        for start in range(0, len(data), 16384):
            self._tls.write(data[start : start + 16384])

    def read(self, size):
        data = b""
        while len(data) < size:
            try:
                data += self._tls.read(65536)
            except ssl.SSLWantReadError:
                received = self.sock.recv(65536)
                assert received, f"the end after {len(data)} bytes"
                self._in.write(received)
        return data

    def update_key(self):
        """Change our key, and ask the other side to change its own (RFC 8446 §4.6.3): ssl has no such call, OpenSSL has."""
        import _ssl

        openssl = ctypes.CDLL(getattr(_ssl, "__file__", None))
        # PyObject_HEAD, the socket, and then the SSL that Python wraps.
        pointer = ctypes.c_void_p.from_address(id(self._tls._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p))
        assert openssl.SSL_key_update(pointer, 1) == 1


@pytest.fixture
def dial(kit):
    """Connects to a Unix socket."""
    peers = []

    def dial(path, context=None):
        sock = socket.socket(socket.AF_UNIX)
        peers.append(kit.Peer(sock))
        sock.connect(str(path))
        if context is not None:
            peers.append(kit.Peer(context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)))
        return peers[-1]

    yield dial
    for peer in peers:
        peer.close()


@pytest.fixture
def greeted(clients):
    """A client that has the banner."""

    def greeted(program):
        client = clients.plain(program.starttls_port)
        assert client.reply()[-1].startswith(b"220")
        return client

    return greeted


def active(program, listener):
    return program.metric("fumi_edge_connections_active", listener=listener)


def gone(program, kit, listener):
    kit.until(lambda: active(program, listener) == 0, "the end of the last connection")


def rejected(program, reason):
    return program.metric("fumi_edge_rejected_total", reason=reason)


# The tunnel


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="reaches into CPython's ssl objects")
def test_key_updates_that_meet_a_full_socket_lose_no_byte(backend, edge, clients, dial, kit, tmp_path):
    """The answer to a key update has to wait for a client that does not read, while the backend does not read either."""
    with socket.socket(socket.AF_UNIX) as sock:
        room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    # What the edge reads at once between two key updates is more than its backend's socket still takes.
    numbers = random.Random(1)
    begin, between, behind, end = (numbers.randbytes(size) for size in (room * 2 // 3, 112 * 1024, 30_000, 40_000))
    whole = kit.hash(begin + between + behind + end)
    go = threading.Event()
    said, received = [], {}

    def handler(peer):
        size = int(peer.line())
        peer.say(b"x" * size)
        said.append(peer)
        go.wait(20)
        received[size] = peer.rest()

    listener = tmp_path / "edge.sock"
    program = edge("--listen", f"unix:{listener}", backend=backend(handler, path=str(tmp_path / "backend.sock")))
    engines = {}
    # How much makes a socket just full depends on the kernel; some of these do.
    for size in range(room - 30_000, room + 4_000, 2_000):
        engine = engines[size] = Engine(dial(listener).sock, clients.context())
        engine.write(b"%d\n" % size)
        engine.write(begin)
        engine.flush()

    def unread(which=termios.FIONREAD):
        return {size: waiting(engine.sock, which) for size, engine in engines.items()}

    # Where the edge itself holds more to write, OpenSSL (here 3.0) gives up the connection at a second key update.
    kit.until(lambda: len(said) == len(engines), "the words of every backend")
    for size, received_by_kernel in settled(unread, program).items():
        if received_by_kernel < size:
            engines.pop(size).sock.close()
    program.process.send_signal(signal.SIGSTOP)
    for engine in engines.values():
        engine.update_key()
        engine.write(between)
        engine.update_key()
        engine.write(behind)
        engine.flush()
    program.process.send_signal(signal.SIGCONT)
    left = settled(lambda: unread(termios.TIOCOUTQ), program)
    assert any(left.values()), "no socket was full: this test shows nothing"
    for size, engine in engines.items():
        assert engine.read(size) == b"x" * size
    settled(lambda: unread(termios.TIOCOUTQ), program)
    go.set()
    for engine in engines.values():
        engine.write(end)
        engine.flush()
        engine.sock.shutdown(socket.SHUT_WR)
    kit.until(lambda: engines.keys() <= received.keys(), "the end of every upload")
    assert [size for size in engines if kit.hash(received[size]) != whole] == []


def test_a_client_that_uploads_slowly_to_a_backend_that_has_said_all_is_not_cut_off():
    """Only silence counts as lingering. The tunnel is told the time, so nobody has to wait."""

    async def trickle(ends):
        loop = asyncio.get_running_loop()
        client, ours, theirs, backend = ends
        buffer = memoryview(bytearray(fumi_edge.connection.tunnel.BUFFER))
        tunnel = fumi_edge.connection.tunnel.Tunnel(loop, buffer, CloseNotify(), ours, theirs, 900.0)
        running = loop.create_task(tunnel.run())
        backend.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(client, 10) == b""
        now = loop.time()
        for _ in range(10):
            await loop.sock_sendall(client, b"more")
            assert await loop.sock_recv(backend, 10) == b"more"
            now += fumi_edge.connection.tunnel.LINGER_SECONDS * 0.7
            tunnel.tick(now)
            await asyncio.sleep(0.01)
            assert not running.done()
        tunnel.tick(now + fumi_edge.connection.tunnel.LINGER_SECONDS * 1.1)
        await running

    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(sock) for pair in (socket.socketpair(), socket.socketpair()) for sock in pair]
        for sock in ends:
            sock.setblocking(False)
        asyncio.run(asyncio.wait_for(trickle(ends), 20))


def test_close_notify_arrives_on_a_unix_socket_whatever_the_size_of_the_last_reply(backend, edge, clients, dial, kit, tmp_path):
    sizes = range(100_000, 240_000, 2_000)
    said = []

    def handler(peer):
        peer.say(b"x" * int(peer.line()))
        said.append(peer)

    path = tmp_path / "edge.sock"
    program = edge("--listen", f"unix:{path}", backend=backend(handler))
    context = clients.context()
    peers = {size: dial(path, context) for size in sizes}
    for size, client in peers.items():
        client.say(b"%d\r\n" % size)
    kit.until(lambda: len(said) == len(sizes), "the last reply of every backend")
    settled(lambda: [waiting(client.sock) for client in peers.values()], program)
    wrong = []
    for size, client in peers.items():
        # An end without close_notify is an error here.
        try:
            got = len(client.rest())
        except OSError as error:
            got = error
        if got != size:
            wrong.append((size, got))
        client.close()
    assert wrong == []
    gone(program, kit, f"unix:{path}")


# STARTTLS


def insists_on_tls(peer):
    """A backend that takes mail and AUTH only from clients who came by TLS, as the header tells."""
    peer.say(b"220 backend.test ESMTP\r\n")
    while line := peer.line():
        peer.heard.append(line)
        verb = line.split()[0].upper()
        if verb in (b"MAIL", b"AUTH") and peer.header.tls is None:
            peer.say({b"MAIL": b"530 5.7.0 STARTTLS first\r\n", b"AUTH": b"538 5.7.11 Encryption required\r\n"}[verb])
        elif verb == b"DATA":
            peer.say(b"354 go ahead\r\n")
            while (content := peer.line()) not in (b".\r\n", b""):
                peer.heard.append(content)
            peer.say(b"250 2.0.0 queued\r\n")
        else:
            peer.say(b"250 2.0.0 ok\r\n")


@pytest.mark.parametrize("command", [b"MAIL FROM:<a@b>\r\n", b"AUTH PLAIN AGEAYg==\r\n"])
def test_a_client_whose_backend_insists_on_tls_can_upgrade_then_and_send(backend, edge, clients, greeted, kit, command):
    server = backend(insists_on_tls)
    program = edge(backend=server)
    client = greeted(program)
    client.ask(b"EHLO plain.test\r\n")
    assert client.ask(command)[0][:3] in (b"530", b"538")
    assert client.ask(command)[0][:3] in (b"530", b"538")
    assert client.ask(b"STARTTLS\r\n") == READY
    client = clients.upgrade(client)
    mail = [b"EHLO secure.test\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n"]
    assert [client.ask(line)[0][:3] for line in mail] == [b"250", b"250", b"250", b"354"]
    assert client.ask(b"hello\r\n.\r\n") == [b"250 2.0.0 queued\r\n"]
    assert server.peer(1).heard == [*mail, b"hello\r\n"]
    kit.until(lambda: program.metric("fumi_edge_starttls_total", result="upgraded") == 1, "the upgrade")


def test_starttls_inside_a_message_that_comes_with_its_envelope_is_only_text(backend, edge, greeted):
    server = backend()
    client = greeted(edge(backend=server))
    envelope = [b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n"]
    content = [b"Subject: x\r\n", b"\r\n", b"STARTTLS\r\n", b"EHLO me\r\n", b"STARTTLS\r\n"]
    client.say(b"".join([*envelope, *content, b".\r\n", b"QUIT\r\n"]))
    assert [client.line()[:3] for _ in range(5)] == [b"250", b"250", b"354", b"250", b"221"]
    assert client.rest() == b""
    assert server.peer().heard == [*envelope, *content, b"QUIT\r\n"]
    assert len(server.peers) == 1


def test_what_answers_an_auth_challenge_is_no_command(backend, edge, greeted):
    """STARTTLS is good base64."""

    def handler(peer):
        peer.say(b"220 hi\r\n")
        for answer in (b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n", b"235 2.7.0 welcome\r\n", b"250 ok\r\n"):
            peer.heard.append(peer.line())
            peer.say(answer)

    server = backend(handler)
    client = greeted(edge(backend=server))
    said = [b"AUTH LOGIN\r\n", b"STARTTLS\r\n", b"c2VjcmV0\r\n", b"NOOP\r\n"]
    assert [client.ask(line)[0][:3] for line in said] == [b"334", b"334", b"235", b"250"]
    assert server.peer().heard == said


@pytest.mark.parametrize(
    "line", [b"STARTTLS\x0b\r\n", b"STARTTLS\x0c\r\n", b"STARTTLS\r\r\n", b"STARTTLS\xa0\r\n", b"STARTTLS\0\r\n"]
)
def test_what_only_looks_like_starttls_does_not_upgrade(backend, edge, greeted, line):
    program = edge(backend=backend())
    client = greeted(program)
    assert not client.ask(line)[0].startswith(b"220")
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert program.metric("fumi_edge_starttls_total", result="upgraded") == 0


NOT_SMTP = [b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10", b"\xff\xfe\x00\x01" * 300, b"\xff\xfe\x00\x01\n" * 3]
HTTP = [b"GET / HTTP/1.1\r\nHost: x\r\nAccept: y\r\n\r\n", b"POST /a HTTP/1.0\r\n\r\nMAIL FROM:<a@b>\r\n"]


@pytest.mark.parametrize(
    ("flags", "hellos"), [((), NOT_SMTP), (("--require-tls",), NOT_SMTP + HTTP)], ids=["", "require-tls"]
)  # fmt: skip
def test_who_does_not_speak_smtp_gets_one_554_and_the_end(backend, edge, greeted, kit, flags, hellos):
    server = backend()
    program = edge(*flags, backend=server)
    for number, hello in enumerate(hellos, 1):
        client = greeted(program)
        client.say(hello)
        words = client.rest()
        assert words.startswith(b"554 5.5.1 ")
        assert words.count(b"\n") == 1
        client.close()
        kit.until(lambda count=number: rejected(program, "not_smtp") == count, "the count")
    assert [entry["reason"] for entry in program.ended(len(hellos))] == ["not_smtp"] * len(hellos)
    assert not {line for peer in server.peers for line in peer.heard} - {b"QUIT\r\n"}


def test_with_require_tls_junk_ends_after_some_errors_with_a_421(backend, edge, greeted):
    server = backend()
    program = edge("--require-tls", backend=server)
    client = greeted(program)
    client.say(b"X\r\n" * 5000)
    words = client.rest().splitlines()
    assert words[-1].startswith(b"421 4.7.0 ")
    assert all(line.startswith(b"530 ") for line in words[:-1])
    assert 0 < len(words) < 100
    client.close()
    program.ended()
    # Who makes the odd mistake is not bothered.
    other = greeted(program)
    assert other.ask(b"X\r\n")[0].startswith(b"530 ")
    assert other.ask(b"STARTTLS\r\n") == READY


@pytest.mark.parametrize("ahead", [b"", b"EHLO ahead\r\n"])
@pytest.mark.parametrize("hang", ["the second banner", "a reply to EHLO", "the first banner"])
def test_a_client_that_breaks_off_while_a_backend_keeps_it_waiting_is_soon_forgotten(backend, edge, clients, kit, hang, ahead):
    waits = []

    def handler(peer):
        if hang == "the first banner" or (hang == "the second banner" and peer.header.tls):
            waits.append(peer)
            peer.rest()
        peer.say(b"220 hi\r\n")
        line = peer.line()
        if line.startswith(b"EHLO"):
            waits.append(peer)
        peer.rest()

    program = edge("--log-level", "debug", backend=backend(handler))
    peers = []
    for _ in range(10):
        client = clients.plain(program.starttls_port)
        if hang != "the first banner":
            client.reply()
        if hang == "a reply to EHLO":
            client.say(b"EHLO x\r\nNOOP\r\n")
        elif hang == "the second banner":
            assert client.ask(b"STARTTLS\r\n") == READY
            client = clients.upgrade(client)
        peers.append(client)
    kit.until(lambda: len(waits) == 10, "the wait")
    for client in peers:
        client.say(ahead)
    for client in peers:
        client.reset()
    gone(program, kit, f"127.0.0.1:{program.starttls_port}")
    assert {entry["reason"] for entry in program.ended(10)} == {"client_reset"}


def test_a_client_that_never_reads_is_let_go_even_when_the_220_does_not_fit(backend, edge, dial, kit, tmp_path):
    def handler(peer):
        peer.say(b"220 hi\r\n")
        while line := peer.line():
            peer.say(b"250 " + b"z" * 994 + b"\r\n" if line.startswith(b"NOOP") else b"221 bye\r\n")

    # How many replies of 1000 bytes a socket takes that nobody reads: here, and so there.
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        most = 0
        while most < 100_000:
            try:
                near.send(bytes(1000))
            except BlockingIOError:
                break
            most += 1
    path = tmp_path / "edge.sock"
    program = edge(
        *("--starttls-listen", f"unix:{path}", "--idle-timeout", "0.5", "--handshake-timeout", "0.5"),
        backend=backend(handler, path=str(tmp_path / "backend.sock")),
    )
    counts = range(most - 8, most + 3)
    for count in counts:
        dial(path).say(b"NOOP\r\n" * count + b"STARTTLS\r\n")
    entries = program.ended(len(counts))
    gone(program, kit, f"unix:{path}")
    # Those for whom the 220 did fit have been asked to shake hands.
    assert {entry["reason"] for entry in entries} <= {"idle_timeout", "handshake_timeout"}
    assert "idle_timeout" in {entry["reason"] for entry in entries}


def test_a_plaintext_clients_bytes_are_counted_once(backend, edge, greeted, kit):
    program = edge(backend=backend())
    client = greeted(program)
    said = [b"EHLO x\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n", b"text\r\n.\r\nQUIT\r\n"]
    for command in said:
        client.ask(command)
    client.rest()
    client.close()
    program.ended()
    # And one whose message comes behind BDAT at once.
    other = greeted(program)
    other.say(b"BDAT 4 LAST\r\ntext")
    other.reply()
    other.reset()
    assert [entry["bytes_in"] for entry in program.ended(2)] == [len(b"".join(said)), 17]
    total = len(b"".join(said)) + 17
    kit.until(lambda: program.metric("fumi_edge_bytes_total", direction="in") == total, "the count")


# Life and death of the program


def test_clients_that_break_off_after_the_handshake_deafen_nobody(edge, clients, kit):
    """Their descriptors pass to others. Many dead backends keep the edge busy, so that the reset comes before it has the 421."""
    dead = [f"127.0.0.{number}:9" for number in range(1, 255)]
    program = edge("--handshake-timeout", "20", *(f"--backend={address}" for address in dead[1:]), backend=dead[0])
    peers = [clients.plain(program.tls_port) for _ in range(10)]
    for client, engine in [(client, Engine(client.sock, clients.context())) for client in peers]:
        engine.flush()
        assert client.more()  # the session ticket: the edge has the handshake behind it
        time.sleep(0.002)
        client.reset()
    gone(program, kit, f"127.0.0.1:{program.tls_port}")
    answers = []

    def well_behaved():
        try:
            client = clients.tls(program.tls_port)
            answers.append(client.rest()[:4])
            client.close()
        except OSError as error:
            answers.append(error)

    threads = [threading.Thread(target=well_behaved) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"421 "] * 20


def test_connections_that_wait_in_the_queue_at_sigterm_are_served(backend, edge, clients, greeted, tmp_path):
    program = edge("--connect-timeout", "30", backend=backend(path=str(tmp_path / "backend.sock")))
    port = program.starttls_port
    greeted(program).close()
    program.process.send_signal(signal.SIGSTOP)
    peers = [clients.plain(port) for _ in range(200)]
    program.process.send_signal(signal.SIGTERM)
    program.process.send_signal(signal.SIGCONT)
    answers = []
    for client in peers:
        try:
            answers.append(client.line()[:3])
        except OSError as error:
            answers.append(error)
        client.close()
    assert answers == [b"220"] * 200
    assert program.process.wait(30) == 0


def test_an_edge_that_drains_is_not_ready(backend, edge, clients, kit):
    program = edge(backend=backend())
    client = clients.tls(program.tls_port)
    client.line()
    assert program.fetch("/readyz")[0] == 200
    program.process.send_signal(signal.SIGTERM)
    kit.until(lambda: program.events("draining"), "the drain")
    assert program.fetch("/readyz")[0] == 503
    assert program.fetch("/healthz")[0] == 200
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    client.close()
    assert program.process.wait(30) == 0


def test_running_out_of_descriptors_is_not_the_backends_fault(backend, edge, clients, kit):
    program = edge("--log-level", "debug", backend=backend())
    pid = program.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    def came_too_late():
        before_it = len(program.events("connection ended"))
        # One more descriptor is there for a client, and none for its backend; unless one that was counted went meanwhile.
        used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        free = [number for number in range(len(used) + 2) if number not in used]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[0] + 1, before[1]))
        with contextlib.closing(clients.plain(program.starttls_port)) as client:
            line = client.line()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        program.ended(before_it + 1)
        return line.startswith(b"421 4.3.2 ")

    kit.until(came_too_late, "a 421")
    assert program.metric("fumi_edge_backend_up") == 1
    assert program.events("backend down") == []
    assert clients.plain(program.starttls_port).line().startswith(b"220")
    assert clients.tls(program.tls_port).line().startswith(b"220")


# Settings


@pytest.fixture
def flags(certificate):
    cert, key = certificate
    return ["--cert", str(cert), "--key", str(key), "--backend", "127.0.0.1:9", "--listen", "127.0.0.1:0"]


@pytest.mark.parametrize("flag", ["--backend", "--listen", "--starttls-listen", "--metrics"])
@pytest.mark.parametrize("check", [(), ("--check",)], ids=["", "check"])
def test_what_cannot_be_a_host_name_is_one_line(flags, flag, check):
    status, lines = run(*flags, flag, "a..b:25", *check)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert "a..b" in lines[0]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--idle-timeout", "nan"),
        ("--idle-timeout", "inf"),
        ("--idle-timeout", "1e-300"),
        ("--handshake-timeout", "nan"),
        ("--connect-timeout", "inf"),
        ("--drain-timeout", "nan"),
    ],
)
def test_a_time_that_is_none_is_refused(flags, flag, value):
    # With --check it would end even if it took the value.
    status, lines = run(*flags, flag, value, "--check")
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert flag in lines[0]


def test_a_key_that_cannot_be_read_is_named(flags, certificate, tmp_path):
    broken = tmp_path / "broken.pem"
    lines = certificate[1].read_text().splitlines()
    lines[1] = "!" + lines[1][1:]
    broken.write_text("\n".join(lines))
    status, lines = run(*flags[:2], "--key", str(broken), *flags[4:], "--check")
    assert status == 2
    assert len(lines) == 1
    assert str(broken) in lines[0]


PORTS = ("--listen", "127.0.0.1:0", "--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")


def test_dev_mode_leaves_no_key_behind_when_it_is_told_twice_to_stop(clients, kit, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = kit.Program("--dev", *PORTS, cwd=tmp_path)
    try:
        assert clients.plain(program.starttls_port).line().startswith(b"220")
        assert list(tmp_path.glob("fumi-dev-*"))
        program.process.send_signal(signal.SIGTERM)
        kit.until(lambda: program.events("draining"), "the drain")
        program.stop()
        assert list(tmp_path.glob("fumi-dev-*/key.pem")) == []
        assert not [line for line in program.noise if "Traceback" in line]
    finally:
        program.kill()


def test_dev_mode_can_be_checked(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run("--dev", *PORTS, "--check") == (0, [])
    assert list(tmp_path.glob("fumi-dev-*")) == []
