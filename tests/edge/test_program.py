"""fumi-edge as an operator meets it: flags, limits, signals, metrics."""

from __future__ import annotations

import os
import pwd
import resource
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.starter import finished


def run(*flags, environment=None):
    """Run to the end; (status, lines of stderr)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FUMI_")}
    done = finished("fumi-edge", *flags, env=clean | (environment or {}))
    return done.returncode, done.stderr.splitlines()


@pytest.fixture
def flags(certificate):
    cert, key = certificate
    return ["--cert", str(cert), "--key", str(key), "--backend", "127.0.0.1:9", "--listen", "127.0.0.1:0"]


@pytest.fixture
def public(certificate):
    """A certificate that everybody can read, and its key that only the owner can; pytest's directories are for nobody else."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        cert, key = Path(name, "cert.pem"), Path(name, "key.pem")
        for source, path, mode in ((certificate[0], cert, 0o644), (certificate[1], key, 0o600)):
            path.write_bytes(source.read_bytes())
            path.chmod(mode)
        yield cert, key


def test_a_wrong_setting_is_one_line_and_status_2(flags, certificate, make_certificate, tmp_path):
    cert, _ = certificate
    other = make_certificate("other.test")[1]
    empty = tmp_path / "empty"
    empty.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for wrong, complaint in (
            ((), "no certificate"),
            (("--cert", str(cert)), "no backend"),
            (("--cert", str(cert), "--backend", "127.0.0.1:9"), "no private key"),
            (("--cert", str(cert), "--key", str(other), "--backend", "127.0.0.1:9"), "does not belong"),
            (("--cert", str(tmp_path / "none"), "--backend", "127.0.0.1:9"), "cannot read the certificate"),
            ((*flags, "--cert", str(cert)), "2 --cert but 1 --key"),
            ((*flags, "--backend", "nonsense"), "is not an address"),
            ((*flags, "--backend", "127.0.0.1:0"), "is no backend"),
            ((*flags, "--listen", f"127.0.0.1:{port}"), f"cannot listen on 127.0.0.1:{port}"),
            ((*flags, "--starttls-listen", "192.0.2.1:25"), "cannot listen on 192.0.2.1:25"),
            ((*flags, "--metrics", f"127.0.0.1:{port}"), f"cannot serve metrics on 127.0.0.1:{port}"),
            ((*flags, "--listen", "fd:77"), "descriptor 77"),
            ((*flags, "--max-clients", "0"), "--max-clients"),
            ((*flags, "--max-clients-per-ip", "0"), "--max-clients-per-ip"),
            ((*flags, "--rate-per-ip", "10"), "'10' is not a rate"),
            ((*flags, "--balance", "best"), "--balance"),
            ((*flags, "--health-interval", "-1"), "--health-interval"),
            ((*flags, "--accept-proxy", "--trusted-proxy", "lb.test"), "is not a network"),
            ((*flags, "--trusted-proxy", "192.0.2.0/24"), "add --accept-proxy"),
            ((*flags, "--require-tls"), "--require-tls is for STARTTLS listeners"),
            ((*flags, "--hide-starttls"), "--hide-starttls is for STARTTLS listeners"),
            (("--dev", "--accept-proxy"), "leave out --accept-proxy and --hide-starttls"),
            (("--dev", "--hide-starttls"), "leave out --accept-proxy and --hide-starttls"),
            ((*flags, "--handshake-timeout", "soon"), "--handshake-timeout"),
            ((*flags, "--min-tls", "1.1"), "--min-tls"),
            ((*flags, "--alpn", "x" * 300), "--alpn"),
            ((*flags, "--socket-mode", "0660"), "--socket-mode is for Unix listeners"),
            ((*flags, "--listen", "unix:s", "--socket-mode", "rw"), "'rw' is not a mode: write one in octal, such as 0660"),
            ((*flags, "--listen", "unix:s", "--socket-mode", "888"), "'888' is not a mode"),
            ((*flags, "--listen", "unix:s", "--socket-mode", "4755"), "'4755' is not a mode"),
            ((*flags, "--ciphers", "nonsense"), "--ciphers: 'nonsense' selects no TLS 1.2 cipher"),
            ((*flags, "--cert-reload-interval", "-1"), "--cert-reload-interval"),
            (("--cert", str(empty), "--backend", "127.0.0.1:9"), "holds no certificate: neither *.pem, nor"),
            (("--cert", str(empty), "--key", str(other), "--backend", "127.0.0.1:9"), "1 --cert but 1 --key"),
            ((*flags, "--no-such-flag"), "--no-such-flag"),
            ((*flags, "--config", str(tmp_path / "none.toml")), "--config"),
        ):
            status, lines = run(*wrong)
            assert status == 2, (wrong, lines)
            assert complaint in lines[-1], (wrong, lines)
            assert lines[-1].startswith("Error: ")
            assert len([line for line in lines if not line.startswith(("Usage:", "Try ")) and line]) == 1, lines


def test_settings_come_from_flags_then_environment_then_file(backend, clients, flags, tmp_path, edge):
    server = backend()
    config = tmp_path / "edge.toml"
    config.write_text("[edge]\nmax-clients = 1\nalpn = 'file'\n[core]\nlisten = ['127.0.0.1:1']\n")
    program = edge("--config", str(config), backend=server)
    context = clients.context()
    context.set_alpn_protocols(["other", "file"])
    client = clients.tls(program.tls_port, context=context)
    assert client.sock.selected_alpn_protocol() == "file"
    assert client.line().startswith(b"220")
    assert clients.plain(program.starttls_port).rest().startswith(b"421 4.7.0")
    assert run(*flags, environment={"FUMI_EDGE_MIN_TLS": "1.1"})[0] == 2
    assert run(*flags, "--min-tls", "1.2", "--check", environment={"FUMI_EDGE_MIN_TLS": "1.1"})[1][0].startswith("Error: backend")


def test_check_says_what_is_wrong_or_that_nothing_is(flags, backend):
    status, lines = run(*flags, "--check")
    assert status == 2
    assert lines == ["Error: backend 127.0.0.1:9: Connection refused"]
    server = backend()
    assert run(*flags[:4], "--backend", server.address, "--check") == (0, [])
    assert server.peers == []  # it came as LOCAL
    refusing = backend(lambda peer: peer.say(b"554 no\r\n"))
    assert run(*flags[:4], "--backend", refusing.address, "--check")[1] == [
        f"Error: backend {refusing.address}: answered '554 no' instead of 220"
    ]


def test_check_warns_of_starttls_that_a_backend_without_headers_offers_inside_tls(flags, backend, kit):
    """The edge only carries bytes there, and cannot take it out of the list."""

    def offering(peer):
        peer.say(b"220 hi\r\n")
        while line := peer.line():
            peer.say(b"250-hi\r\n250-StartTLS\r\n250 SIZE\r\n" if line[:4] == b"EHLO" else b"221 bye\r\n")
            if line[:4] == b"QUIT":
                return

    warned, well = backend(offering, proxy=False), backend(kit.smtp, proxy=False)
    both = (*flags[:4], "--backend", warned.address, "--backend", well.address)
    done = finished("fumi-edge", *both, "--proxy-protocol", "off", "--check")
    assert done.returncode == 0, done.stderr
    warning = f"warning: backend {warned.address} offers STARTTLS, inside TLS too, where RFC 3207 forbids it: turn it off there"
    assert [line for line in done.stdout.splitlines() if "warning" in line] == [warning]


@pytest.mark.parametrize(("version", "warned"), [("v2", True), ("v1", True), ("off", False)])
def test_check_warns_of_clients_whose_header_other_servers_reject(flags, backend, tmp_path, kit, version, warned):
    def handler(peer):
        if version == "v1":
            peer.line()
        kit.smtp(peer)

    server = backend(handler, proxy=version == "v2")
    listen = ("--listen", f"unix:{tmp_path}/sock", "--listen", "127.0.0.1:0", "--proxy-protocol", version)
    done = finished("fumi-edge", *flags[:4], "--backend", server.address, *listen, "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"warning: --listen unix:{tmp_path}/sock: Postfix, Exim and Dovecot reject") == warned
    assert done.stdout.count("warning") == warned


def test_check_looks_at_the_listeners(flags, backend, tmp_path):
    flags = [*flags[:4], "--backend", backend().address]
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as mute:
        port = taken.getsockname()[1]
        for listener, complaint in (
            (("--listen", "192.0.2.1:25"), "cannot listen on --listen 192.0.2.1:25: Cannot assign requested address"),
            (("--starttls-listen", "no.such.invalid:25"), "cannot listen on --starttls-listen no.such.invalid:25: "),
            (("--metrics", f"unix:{tmp_path}/none/sock"), f"unix:{tmp_path}/none/sock: there is no directory {tmp_path}/none"),
            (("--listen", f"unix:{tmp_path}/file"), "the file exists and is not a socket"),
            (("--listen", "fd:77"), "descriptor 77 is not an open socket"),
            (("--listen", f"fd:{mute.fileno()}"), f"descriptor {mute.fileno()} is not a"),
        ):
            status, lines = run(*flags, *listener, "--check")
            assert (status, len(lines)) == (2, 1)
            assert complaint in lines[0]
        several = ("--listen", "192.0.2.1:25", "--listen", "203.0.113.9:25")
        assert run(*flags, *several, "--check")[1][0].count("; cannot listen on") == 1
        # An edge that runs has it, and is to be restarted.
        served = ("--listen", f"127.0.0.1:{port}", "--metrics", f"unix:{tmp_path}/sock")
        done = finished("fumi-edge", *flags, *served, "--check")
        taken_by = f"127.0.0.1:{port} is already in use (by a running fumi-edge or another program)\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, taken_by + "configuration OK\n", "")
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize("check", [(), ("--check",)], ids=["", "check"])
def test_an_address_that_is_given_twice_is_an_error_that_says_so(flags, check):
    for more, complaint in (
        (("--listen", "127.0.0.1:4465", "--listen", "127.0.0.1:4465"), "--listen 127.0.0.1:4465 is given twice"),
        (
            ("--listen", "unix:sock", "--starttls-listen", "unix:sock"),
            "--listen unix:sock and --starttls-listen unix:sock: one address cannot serve both",
        ),
        (
            ("--starttls-listen", "127.0.0.1:4465", "--metrics", ":4465"),
            "--metrics :4465 is every address of this machine, and --starttls-listen 127.0.0.1:4465 one of them",
        ),
    ):
        assert run(*flags, *more, *check) == (2, [f"Error: {complaint}"])


@pytest.mark.skipif(os.getuid() != 0, reason="only root has files that nobody can read")
def test_check_says_what_the_user_cannot_read(flags, backend, public):
    cert, key = public
    flags = ["--cert", str(cert), "--key", str(key), "--backend", backend().address, "--listen", "127.0.0.1:0", "--check"]
    assert run(*flags, "--user", "nobody") == (2, [f"Error: --user nobody cannot read {key}"])
    os.chown(key, 0, pwd.getpwnam("nobody").pw_gid)
    key.chmod(0o640)
    assert run(*flags, "--user", "nobody") == (0, [])
    cert.parent.chmod(0o700)
    assert run(*flags, "--user", "nobody") == (2, [f"Error: --user nobody cannot read {cert}; --user nobody cannot read {key}"])
    assert run(*flags, "--user", "root") == (0, [])


def test_beyond_max_clients_tls_is_closed_and_starttls_gets_421(backend, edge, clients):
    program = edge("--max-clients", "2", backend=backend())
    first, second = clients.tls(program.tls_port), clients.plain(program.starttls_port)
    first.line()
    second.line()
    with pytest.raises((ssl.SSLError, OSError)):
        clients.tls(program.tls_port)
    assert clients.plain(program.starttls_port).rest() == b"421 4.7.0 Too many connections, try again later\r\n"
    assert program.metric("fumi_edge_rejected_total", reason="max_clients") == 2
    first.ask(b"QUIT\r\n")
    first.close()
    program.ended()
    assert clients.tls(program.tls_port).line().startswith(b"220")


def test_one_too_many_that_talks_before_its_turn_hears_421_all_the_same(backend, edge, clients):
    program = edge("--max-clients", "1", backend=backend())
    first = clients.plain(program.starttls_port)
    first.line()
    program.process.send_signal(signal.SIGSTOP)
    early = clients.plain(program.starttls_port)
    early.say(b"EHLO early\r\n")
    program.process.send_signal(signal.SIGCONT)
    assert early.rest() == b"421 4.7.0 Too many connections, try again later\r\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_accepting_and_lets_connections_end(backend, edge, clients, kit, number):
    program = edge(backend=backend())
    ports = program.tls_port, program.starttls_port
    client = clients.tls(program.tls_port)
    client.line()
    program.process.send_signal(number)
    kit.until(lambda: program.events("draining"), "the drain")
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            clients.plain(port)
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    client.close()
    assert program.process.wait(30) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_what_is_a_soft_stop_to_others_is_nothing(backend, edge, clients, number, workers):
    program = edge("--workers", workers, backend=backend())
    program.process.send_signal(number)
    client = clients.tls(program.tls_port)
    assert client.line().startswith(b"220")
    client.close()
    assert program.stop() == 0


def test_what_has_not_ended_after_the_drain_timeout_is_broken_off(backend, edge, clients):
    program = edge("--drain-timeout", "0.2", backend=backend())
    client, plain = clients.tls(program.tls_port), clients.plain(program.starttls_port)
    client.line()
    plain.line()
    assert program.stop() == 0
    assert client.rest() == b""
    assert {entry["reason"] for entry in program.events("connection ended")} == {"shutdown"}


def test_metrics_are_there_from_the_start_and_count(backend, edge, clients, kit):
    server = backend()
    program = edge(backend=server)
    status, text = program.fetch("/metrics")
    assert status == 200
    counters = ["connections", "handshakes", "tls_sessions", "starttls", "bytes", "backend_errors", "rejected"]
    histograms = ["handshake_seconds", "backend_connect_seconds", "session_seconds"]
    gauges = ["connections_active", "backend_up", "certificate_not_after_timestamp_seconds", "build_info"]
    for name in [*(f"{each}_total" for each in counters), *(f"{each}_count" for each in histograms), *gauges]:
        assert f"\nfumi_edge_{name}" in text, name
    before = {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    listener = f"127.0.0.1:{program.tls_port}"
    for result in ("ok", "timeout", "protocol", "certificate", "reset"):
        assert program.metric("fumi_edge_handshakes_total", listener=listener, result=result) == 0
    client = clients.tls(program.tls_port)
    banner = client.line()
    assert program.metric("fumi_edge_connections_active", listener=listener) == 1
    client.ask(b"QUIT\r\n")
    client.close()
    program.ended()
    kit.until(lambda: program.metric("fumi_edge_connections_active", listener=listener) == 0, "the end")
    assert program.metric("fumi_edge_connections_total", listener=listener) == 1
    assert program.metric("fumi_edge_handshakes_total", listener=listener, result="ok") == 1
    assert program.metric("fumi_edge_handshake_seconds_count") == 1
    assert program.metric("fumi_edge_session_seconds_count") == 1
    assert program.metric("fumi_edge_backend_connect_seconds_count", backend=server.address) == 1
    assert program.metric("fumi_edge_bytes_total", direction="in") == 6
    assert program.metric("fumi_edge_bytes_total", direction="out") == len(banner) + len(b"221 2.0.0 bye\r\n")
    cipher = program.events("connection ended")[0]["cipher"]
    assert program.metric("fumi_edge_tls_sessions_total", version="TLSv1.3", cipher=cipher, resumed="false") == 1
    assert program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost") > 1.7e9
    after = {line.rpartition(" ")[0] for line in program.fetch("/metrics")[1].splitlines() if not line.startswith("#")}
    assert before == after  # nothing a client did has made a new series


def test_a_connection_that_lasts_counts_its_bytes_meanwhile(backend, edge, clients, kit):
    program = edge("--idle-timeout", "4", backend=backend())
    client = clients.tls(program.tls_port)
    client.line()
    client.ask(b"NOOP\r\n")
    kit.until(lambda: program.metric("fumi_edge_bytes_total", direction="in") == 6, "the bytes")


def test_ready_means_that_a_backend_answers(backend, edge, kit):
    server = backend()
    program = edge(backend=server)
    assert program.fetch("/healthz") == (200, "ok\n")
    assert program.fetch("/readyz") == (200, "ready\n")
    server.close()
    status, text = program.fetch("/readyz")
    assert status == 503
    assert server.address in text
    assert program.fetch("/healthz")[0] == 200


def test_running_out_of_descriptors_is_survived(backend, certificate, edge, clients, kit):
    """With few descriptors, accept pauses, says so once, and resumes when some are free."""
    program = edge(backend=backend())
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (24, most))
    waiting = [clients.plain(program.starttls_port) for _ in range(20)]
    kit.until(lambda: program.events("cannot accept, pausing"), "the pause")
    for client in waiting:
        client.close()
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (most, most))

    def answered():
        client = clients.tls(program.tls_port)
        return client.line().startswith(b"220")

    kit.until(answered, "an answer")
    assert len(program.events("cannot accept, pausing")) == 1


def test_whom_there_are_no_descriptors_for_waits_and_hears_no_421(backend, edge, clients, kit):
    """A client takes two: where there is one left, it is not accepted, and the backend's are not missed."""
    program = edge("--health-interval", "0.2", backend=backend())
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (40, most))
    waiting = [clients.plain(program.starttls_port) for _ in range(60)]
    for client in waiting:
        # Whoever has been served makes room for another.
        assert client.line() == b"220 backend.test ESMTP\r\n"
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
        assert client.rest() == b""
        client.close()
    assert len(program.events("cannot accept, pausing")) == 1
    assert program.fetch("/readyz") == (200, "ready\n")
    assert {entry["reason"] for entry in program.ended(60)} == {"backend_closed"}


def test_clients_that_upgrade_at_once_find_descriptors_although_backends_are_slow_to_close(backend, edge, clients, kit):
    """Each needs a second connection to the backend, and the first one is not closed yet."""
    go = threading.Event()

    def handler(peer):
        kit.smtp(peer)
        go.wait(20)

    program = edge("--max-clients", "1000", backend=backend(handler))
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (120, most))
    peers = [clients.plain(program.starttls_port) for _ in range(36)]
    for peer in peers:
        assert peer.line() == b"220 backend.test ESMTP\r\n"
    for peer in peers:
        assert peer.ask(b"STARTTLS\r\n") == [b"220 2.0.0 Ready to start TLS\r\n"]
    upgraded = [clients.upgrade(peer) for peer in peers]
    for peer in upgraded:
        assert peer.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    # Others wait until there is room, and are not turned away.
    late = [clients.plain(program.starttls_port) for _ in range(20)]
    kit.until(lambda: program.events("cannot accept, pausing"), "the pause")
    go.set()
    for peer in upgraded:
        peer.close()
    for peer in late:
        assert peer.line() == b"220 backend.test ESMTP\r\n"


def test_a_listening_socket_may_be_a_unix_socket(backend, edge, tmp_path, kit):
    server = backend()
    path = str(tmp_path / "edge.sock")
    edge("--starttls-listen", f"unix:{path}", backend=server)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        client = kit.Peer(sock)
        assert client.line() == b"220 backend.test ESMTP\r\n"
        assert server.peer().header.transport == "UNIX"
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_unix_sockets_get_the_mode_that_was_asked_for(backend, edge, tmp_path, workers):
    paths = [tmp_path / name for name in ("a.sock", "b.sock")]
    listeners = ("--starttls-listen", f"unix:{paths[0]}", "--listen", f"unix:{paths[1]}")
    edge(*listeners, "--socket-mode", "0622", "--workers", workers, backend=backend())
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o622, 0o622]


def test_a_client_that_vanishes_at_every_step_leaves_no_trace(backend, edge, clients, kit):
    program = edge("--log-level", "debug", backend=backend())

    def vanish(step):
        client = clients.plain(program.starttls_port)
        if step > 0:
            client.line()
        if step > 1:
            client.say(b"EHLO x\r\n")
        if step > 2:
            client.reply()
            client.say(b"STARTTLS\r\n")
        if step > 3:
            client.reply()
            client = clients.upgrade(client)
        if step > 4:
            client.ask(b"NOOP\r\n")
        client.reset() if step % 2 else client.close()

    threads = [threading.Thread(target=vanish, args=(step,)) for step in range(6) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    program.ended(30)
    kit.until(
        lambda: program.metric("fumi_edge_connections_active", listener=f"127.0.0.1:{program.starttls_port}") == 0, "the end"
    )


def test_dev_mode_takes_a_message_over_both_ports(tmp_path, kit):
    ports = ("--listen", "127.0.0.1:0", "--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    program = kit.Program("--dev", *ports, cwd=tmp_path)
    try:
        context = ssl._create_unverified_context()
        with smtplib.SMTP_SSL("127.0.0.1", program.tls_port, context=context) as client:
            client.sendmail("a@example.org", ["b@example.org"], "Subject: one\n\nhello\n")
        with smtplib.SMTP("127.0.0.1", program.starttls_port) as client:
            client.starttls(context=context)
            client.sendmail("a@example.org", ["b@example.org"], "Subject: two\n\nhello\n")
        assert len(list((tmp_path / "maildir" / "new").iterdir())) == 2
        assert program.stop() == 0
        printed = program.stdout.read()
        for name in ("swaks", "curl", "openssl s_client", "smtplib", str(program.tls_port)):
            assert name in printed
    finally:
        program.kill()


@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_root_becomes_the_user_for_good(backend, edge, clients, kit, tmp_path, certificate, workers):
    program = edge("--user", "nobody", *workers, backend=backend())
    assert clients.tls(program.tls_port).line().startswith(b"220")
    pid = program.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pids = [pid, *children]
    assert len(pids) == (4 if workers else 1)
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        ids = [line.split()[1:] for line in status.splitlines() if line.startswith(("Uid:", "Gid:"))]
        nobody = pwd.getpwnam("nobody")
        assert ids == [[str(nobody.pw_uid)] * 4, [str(nobody.pw_gid)] * 4]


@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_keys_that_the_user_cannot_read_are_said_at_once(backend, edge, kit, public, workers):
    server, (open_to_all, secret) = backend(), public
    program = edge("--user", "nobody", *workers, backend=server, certs=("--cert", open_to_all, "--key", secret))
    (line,) = kit.until(lambda: program.events("no renewal without a restart"), "the warning")
    assert (line["level"], line["user"], line["unreadable"]) == ("warning", "nobody", str(secret))
    secret.chmod(0o644)
    program = edge("--user", "nobody", backend=server, certs=("--cert", open_to_all, "--key", secret))
    assert program.fetch("/healthz")[0] == 200
    assert program.events(line["event"]) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_threads_need_nothing_that_the_user_may_not_read(backend, edge, clients, kit, certificate):
    """A name is resolved and files are looked at in threads, and asyncio imports what it needs for those when it has to."""
    server = backend()
    port = server.address.rpartition(":")[2]
    program = edge("--user", "nobody", "--cert-reload-interval", "0", backend=f"localhost:{port}")
    assert "concurrent.futures.thread" in subprocess.check_output(
        [sys.executable, "-c", "import fumi_edge.program.work, sys; print(*sys.modules)"], text=True
    )
    assert clients.tls(program.tls_port).line().startswith(b"220")
    program.process.send_signal(signal.SIGHUP)
    (line,) = kit.until(lambda: program.events("reloaded in part"), "the reload")
    assert "Permission denied" in line["error"]


def test_a_user_that_is_not_there_is_an_error(flags):
    status, output = run(*flags, "--user", "no-such-user")
    assert (status, output) == (2, ["Error: --user: there is no user 'no-such-user'"])
