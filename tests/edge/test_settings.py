"""Flags, environment and configuration files: wrong values, what --check finds, and which place wins."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend, smtp
from tests.edge.clients import Clients
from tests.edge.program import StartEdge, run
from tests.support.certificates import CertificateFiles, MakeCertificate
from tests.support.peer import Peer
from tests.support.starter import finished


@pytest.fixture
def flags(certificate: CertificateFiles) -> list[str]:
    cert, key = certificate
    return ["--cert", str(cert), "--key", str(key), "--backend", "127.0.0.1:9", "--listen", "127.0.0.1:0"]


@pytest.mark.parametrize("flag", ["--backend", "--listen", "--starttls-listen", "--metrics"])
@pytest.mark.parametrize("check", [(), ("--check",)], ids=["", "check"])
def test_an_invalid_host_name_is_an_error_of_one_line(flags: list[str], flag: str, check: tuple[str, ...]) -> None:
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
def test_an_invalid_time_is_an_error(flags: list[str], flag: str, value: str) -> None:
    # With --check it would end even if it took the value.
    status, lines = run(*flags, flag, value, "--check")
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert flag in lines[0]


def test_a_key_that_cannot_be_read_is_named(flags: list[str], certificate: CertificateFiles, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    lines = certificate[1].read_text().splitlines()
    lines[1] = "!" + lines[1][1:]
    broken.write_text("\n".join(lines))
    status, lines = run(*flags[:2], "--key", str(broken), *flags[4:], "--check")
    assert status == 2
    assert len(lines) == 1
    assert str(broken) in lines[0]


def test_a_wrong_setting_is_one_line_and_status_2(
    flags: list[str], certificate: CertificateFiles, make_certificate: MakeCertificate, tmp_path: Path
) -> None:
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
            ((*flags, "--backend", "nonsense"), "write HOST:PORT, [V6]:PORT, :PORT, unix:/path or tls:HOST:PORT"),
            ((*flags, "--backend", "tls:nonsense"), "'nonsense' is not an address: write tls:HOST:PORT"),
            ((*flags, "--backend", "127.0.0.1:0"), "is not a backend"),
            (
                (*flags, "--listen", f"127.0.0.1:{port}"),
                f"--listen 127.0.0.1:{port}: Address already in use (another",
            ),
            (
                (*flags, "--starttls-listen", "192.0.2.1:25"),
                "--starttls-listen 192.0.2.1:25: Cannot assign",
            ),
            (
                (*flags, "--metrics", f"127.0.0.1:{port}"),
                f"--metrics 127.0.0.1:{port}: Address already in use (another",
            ),
            ((*flags, "--listen", "fd:77"), "descriptor 77"),
            ((*flags, "--max-clients", "0"), "--max-clients"),
            ((*flags, "--max-clients-per-ip", "0"), "--max-clients-per-ip"),
            ((*flags, "--rate-per-ip", "10"), "'10' is not a rate"),
            ((*flags, "--balance", "best"), "--balance"),
            ((*flags, "--health-interval", "-1"), "--health-interval"),
            ((*flags, "--accept-proxy", "--trusted-proxy", "lb.test"), "is not a network"),
            ((*flags, "--trusted-proxy", "192.0.2.0/24"), "without --accept-proxy: add it"),
            ((*flags, "--require-tls"), "--require-tls applies to STARTTLS listeners only"),
            ((*flags, "--hide-starttls"), "--hide-starttls applies to STARTTLS listeners only"),
            (("--dev", "--accept-proxy"), "remove --accept-proxy and --hide-starttls"),
            (("--dev", "--hide-starttls"), "remove --accept-proxy and --hide-starttls"),
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


def test_settings_come_from_flags_then_environment_then_file(
    backend: StartBackend, clients: Clients, flags: list[str], tmp_path: Path, edge: StartEdge
) -> None:
    server = backend()
    config = tmp_path / "edge.toml"
    config.write_text("[edge]\nmax-clients = 1\nalpn = 'file'\n[core]\nlisten = ['127.0.0.1:1']\n")
    program = edge("--config", str(config), backend=server)
    context = clients.context()
    context.set_alpn_protocols(["other", "file"])
    client = clients.tls(program.tls_port, context=context)
    assert client.tls.selected_alpn_protocol() == "file"
    assert client.line().startswith(b"220")
    assert clients.plain(program.starttls_port).rest().startswith(b"421 4.7.0")
    assert run(*flags, environment={"FUMI_EDGE_MIN_TLS": "1.1"})[0] == 2
    assert run(*flags, "--min-tls", "1.2", "--check", environment={"FUMI_EDGE_MIN_TLS": "1.1"})[1][0].startswith("Error: backend")


def test_check_says_what_is_wrong_or_that_nothing_is(flags: list[str], backend: StartBackend) -> None:
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


def test_check_warns_of_starttls_that_a_backend_without_headers_offers_inside_tls(
    flags: list[str], backend: StartBackend
) -> None:
    """The edge only carries bytes there, and cannot take it out of the list."""

    def offering(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        while line := peer.line():
            peer.say(b"250-hi\r\n250-StartTLS\r\n250 SIZE\r\n" if line[:4] == b"EHLO" else b"221 bye\r\n")
            if line[:4] == b"QUIT":
                return

    warned, well = backend(offering, proxy=False), backend(smtp, proxy=False)
    both = (*flags[:4], "--backend", warned.address, "--backend", well.address)
    done = finished("fumi-edge", *both, "--proxy-protocol", "off", "--check")
    assert done.returncode == 0, done.stderr
    warning = f"warning: backend {warned.address} offers STARTTLS, which RFC 3207 forbids inside TLS: disable it there"
    assert [line for line in done.stdout.splitlines() if "warning" in line] == [warning]


@pytest.mark.parametrize(("version", "warned"), [("v2", True), ("v1", True), ("off", False)])
def test_check_warns_of_clients_whose_header_other_servers_reject(
    flags: list[str], backend: StartBackend, tmp_path: Path, version: str, warned: bool
) -> None:
    def handler(peer: Peer) -> None:
        if version == "v1":
            peer.line()
        smtp(peer)

    server = backend(handler, proxy=version == "v2")
    listen = ("--listen", f"unix:{tmp_path}/sock", "--listen", "127.0.0.1:0", "--proxy-protocol", version)
    done = finished("fumi-edge", *flags[:4], "--backend", server.address, *listen, "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"warning: --listen unix:{tmp_path}/sock: Postfix, Exim and Dovecot reject") == warned
    assert done.stdout.count("warning") == warned


def test_check_looks_at_the_listeners(flags: list[str], backend: StartBackend, tmp_path: Path) -> None:
    flags = [*flags[:4], "--backend", backend().address]
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as mute:
        port = taken.getsockname()[1]
        for listener, complaint in (
            (
                ("--listen", "192.0.2.1:25"),
                "--listen 192.0.2.1:25: Cannot assign requested address (this machine has no",
            ),
            (("--starttls-listen", "no.such.invalid:25"), "--starttls-listen no.such.invalid:25: "),
            (
                ("--metrics", f"unix:{tmp_path}/none/sock"),
                f"unix:{tmp_path}/none/sock: the directory {tmp_path}/none does not exist",
            ),
            (("--listen", f"unix:{tmp_path}/file"), "the file exists and is not a socket"),
            (("--listen", "fd:77"), "descriptor 77 is not an open socket"),
            (("--listen", f"fd:{mute.fileno()}"), f"descriptor {mute.fileno()} is not a"),
        ):
            status, lines = run(*flags, *listener, "--check")
            assert (status, len(lines)) == (2, 1)
            assert complaint in lines[0]
        several = ("--listen", "192.0.2.1:25", "--listen", "203.0.113.9:25")
        assert run(*flags, *several, "--check")[1][0].count("; --listen 203.0.113.9:25: Cannot assign") == 1
        # An edge that runs has it, and is to be restarted.
        served = ("--listen", f"127.0.0.1:{port}", "--metrics", f"unix:{tmp_path}/sock")
        done = finished("fumi-edge", *flags, *served, "--check")
        taken_by = f"127.0.0.1:{port} is already in use (by a running fumi-edge or another program)\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, taken_by + "configuration OK\n", "")
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize("check", [(), ("--check",)], ids=["", "check"])
def test_an_address_that_is_given_twice_is_an_error_that_says_so(flags: list[str], check: tuple[str, ...]) -> None:
    for more, complaint in (
        (("--listen", "127.0.0.1:4465", "--listen", "127.0.0.1:4465"), "--listen 127.0.0.1:4465 is given twice: remove one"),
        (
            ("--listen", "unix:sock", "--starttls-listen", "unix:sock"),
            "--listen unix:sock and --starttls-listen unix:sock: one address cannot serve both",
        ),
        (
            ("--starttls-listen", "127.0.0.1:4465", "--metrics", ":4465"),
            "--starttls-listen 127.0.0.1:4465 is part of --metrics :4465, which is every address of this machine: remove one",
        ),
    ):
        status, lines = run(*flags, *more, *check)
        assert (status, len(lines)) == (2, 1)
        assert lines[0].startswith(f"Error: {complaint}")


@pytest.mark.skipif(os.getuid() != 0, reason="only root has files that nobody can read")
def test_check_says_what_the_user_cannot_read(flags: list[str], backend: StartBackend, public: CertificateFiles) -> None:
    cert, key = public
    flags = ["--cert", str(cert), "--key", str(key), "--backend", backend().address, "--listen", "127.0.0.1:0", "--check"]
    assert run(*flags, "--user", "nobody") == (2, [f"Error: --user nobody cannot read {key}"])
    os.chown(key, 0, pwd.getpwnam("nobody").pw_gid)
    key.chmod(0o640)
    assert run(*flags, "--user", "nobody") == (0, [])
    cert.parent.chmod(0o700)
    assert run(*flags, "--user", "nobody") == (2, [f"Error: --user nobody cannot read {cert}; --user nobody cannot read {key}"])
    assert run(*flags, "--user", "root") == (0, [])


def test_a_user_that_is_not_there_is_an_error(flags: list[str]) -> None:
    status, output = run(*flags, "--user", "no-such-user")
    assert (status, output) == (2, ["Error: --user: user 'no-such-user' does not exist"])
