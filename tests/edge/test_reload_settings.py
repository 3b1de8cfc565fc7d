"""SIGHUP reads all settings again: new connections use them, open ones keep the old, and a wrong file changes nothing."""

from __future__ import annotations

import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program
from tests.support.certificates import CertificateFiles
from tests.support.peer import Peer
from tests.support.proc import open_files
from tests.support.waiting import until


class Configured:
    """A fumi-edge with everything in a file."""

    def __init__(self, path: Path, certificate: CertificateFiles) -> None:
        self._path = path
        self._certificate = certificate
        self.program: Program

    def write(self, backend: str, *lines: str, certificate: CertificateFiles | None = None) -> None:
        cert, key = certificate or self._certificate
        settings = [f'cert = ["{cert}"]', f'key = ["{key}"]', f'backend = ["{backend}"]', "health-interval = 0", *lines]
        if not any(line.startswith("listen") for line in lines):
            settings.append('listen = ["127.0.0.1:0"]')
        self._path.write_text("\n".join(settings))

    def start(self, *flags: str) -> None:
        self.program = Program("--config", str(self._path), "--metrics", "127.0.0.1:0", *flags)

    def reload(self, outcome: str) -> dict[str, str]:
        """Send SIGHUP, and return the next line in the log with this event."""
        before = len(self.program.events(outcome))
        self.program.process.send_signal(signal.SIGHUP)
        return until(lambda: self.program.events(outcome)[before:], outcome)[0]


@pytest.fixture
def configured(tmp_path: Path, certificate: CertificateFiles) -> Iterator[Configured]:
    configured = Configured(tmp_path / "edge.toml", certificate)
    yield configured
    configured.program.stop()


def named(name: bytes) -> Callable[[Peer], None]:
    def handler(peer: Peer) -> None:
        peer.say(b"220 " + name + b"\r\n")
        while peer.line():
            peer.say(b"250 " + name + b"\r\n")

    return handler


@pytest.mark.parametrize("workers", ["1", "2"])
def test_new_connections_use_other_backends_and_open_ones_stay(
    configured: Configured, backend: StartBackend, clients: Clients, workers: str
) -> None:
    one, two = backend(named(b"one")), backend(named(b"two"))
    configured.write(one.address)
    configured.start("--workers", workers)
    before = clients.tls(configured.program.tls_port)
    assert before.line() == b"220 one\r\n"
    configured.write(two.address)
    configured.reload("reloaded")
    assert clients.tls(configured.program.tls_port).line() == b"220 two\r\n"
    assert before.ask(b"NOOP\r\n") == [b"250 one\r\n"]
    assert two.address in configured.program.fetch("/")[1]
    until(lambda: configured.program.metric("fumi_edge_backend_up", backend=two.address) == 1)


def test_a_wrong_file_changes_nothing_and_the_log_says_why(
    configured: Configured, backend: StartBackend, clients: Clients
) -> None:
    one = backend(named(b"one"))
    configured.write(one.address)
    configured.start()
    for lines, error in (
        (('idle-timeout = "soon"',), "idle-timeout"),
        (("idle-timeuot = 3",), "idle-timeuot"),
        (('cert = ["/nowhere.pem"]',), "edge.toml"),
        (('min-tls = "1.3"', 'client-ca = "/nowhere.pem"'), "/nowhere.pem"),
        (('balance = "first"', "trusted-proxy = ['10.0.0.0/8']"), "--trusted-proxy"),
    ):
        configured.write("127.0.0.1:1", *lines)
        assert error in configured.reload("reload failed: the old settings stay in use")["error"]
        assert clients.tls(configured.program.tls_port).line() == b"220 one\r\n"


def test_another_certificate_and_tls_policy_are_used_for_new_handshakes(
    configured: Configured,
    backend: StartBackend,
    clients: Clients,
    certificate: CertificateFiles,
    make_certificate: Callable[..., CertificateFiles],
) -> None:
    one, other = backend(named(b"one")), make_certificate("localhost")
    configured.write(one.address)
    configured.start()
    old, new = clients.context(), ssl.create_default_context(cafile=str(other[0]))
    client = clients.tls(configured.program.tls_port, context=old)
    configured.write(one.address, 'min-tls = "1.3"', certificate=other)
    configured.reload("reloaded")
    assert clients.tls(configured.program.tls_port, context=new).line() == b"220 one\r\n"
    with pytest.raises(ssl.SSLCertVerificationError):
        clients.tls(configured.program.tls_port, context=old)
    new.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        clients.tls(configured.program.tls_port, context=new)
    assert client.line() == b"220 one\r\n"
    assert client.ask(b"NOOP\r\n") == [b"250 one\r\n"]


def test_reloads_leave_no_ticket_keys_open(configured: Configured, backend: StartBackend) -> None:
    one = backend(named(b"one"))
    configured.write(one.address)
    configured.start("--workers", "2")
    for version in ("1.3", "1.2", "1.3"):
        configured.write(one.address, f'min-tls = "{version}"')
        configured.reload("reloaded")
    for pid in (configured.program.process.pid, *configured.program.workers()):
        assert len([name for name in open_files(pid) if "ticket-keys" in name]) <= 1


def test_what_a_reload_cannot_change_is_named(configured: Configured, backend: StartBackend, clients: Clients) -> None:
    one = backend(named(b"one"))
    configured.write(one.address)
    configured.start()
    configured.write(one.address, 'listen = ["127.0.0.2:0"]', "workers = 2")
    warning = configured.reload("settings changed that need a restart")
    assert warning["settings"] == "listen,workers"
    assert clients.tls(configured.program.tls_port).line() == b"220 one\r\n"


def test_a_new_idle_timeout_is_for_new_connections(configured: Configured, backend: StartBackend, clients: Clients) -> None:
    one = backend(named(b"one"))
    configured.write(one.address)
    configured.start()
    held = clients.tls(configured.program.tls_port)
    assert held.line() == b"220 one\r\n"
    configured.write(one.address, "idle-timeout = 0.3")
    configured.reload("reloaded")
    idle = clients.tls(configured.program.tls_port)
    assert idle.rest() in (b"220 one\r\n", b"")
    assert held.ask(b"NOOP\r\n") == [b"250 one\r\n"]


def test_a_new_limit_is_for_new_connections(configured: Configured, backend: StartBackend, clients: Clients) -> None:
    one = backend(named(b"one"))
    configured.write(one.address)
    configured.start()
    configured.write(one.address, "max-clients-per-ip = 1")
    configured.reload("reloaded")
    held = clients.tls(configured.program.tls_port)
    assert held.line() == b"220 one\r\n"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        clients.tls(configured.program.tls_port)
    assert held.ask(b"NOOP\r\n") == [b"250 one\r\n"]
