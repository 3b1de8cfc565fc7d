"""What the edge's tests share: a certificate, backends in threads, the real program, and clients."""

from __future__ import annotations

import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fumi_core.runtime.addresses import parse_address
from fumi_edge.backends.choice import Backends
from fumi_edge.backends.dialing import Remote
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.metrics import EdgeMetrics
from tests.edge.backends import Backend, smtp
from tests.edge.clients import Clients
from tests.edge.program import Program
from tests.support.certificates import Authority, self_signed
from tests.support.peer import Peer
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="session")
def make_certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes a self-signed certificate for the names given; returns the paths of certificate and key."""

    def make(*names: str, options: tuple[str, ...] = ("-days", "2")) -> tuple[Path, Path]:
        return self_signed(tmp_path_factory.mktemp("certificate"), *names, options=options)

    return make


@pytest.fixture(scope="session")
def make_authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    return lambda name="Test CA": Authority(tmp_path_factory.mktemp("authority"), name)


@pytest.fixture(scope="session")
def authority(make_authority: Callable[..., Authority]) -> Authority:
    return make_authority()


@pytest.fixture
def clients(certificate: tuple[Path, Path]) -> Iterator[Clients]:
    clients = Clients(certificate[0])
    yield clients
    clients.close()


@pytest.fixture
def backend() -> Iterator[Callable[..., Backend]]:
    """Starts backends; fails the test when a handler raised."""
    started: list[Backend] = []

    def start(handler: Callable[[Peer], None] = smtp, **options: Any) -> Backend:
        started.append(Backend(handler, **options))
        return started[-1]

    yield start
    for each in started:
        each.give_up()
        assert each.errors == []


@pytest.fixture
def edge(certificate: tuple[Path, Path]) -> Iterator[Callable[..., Program]]:
    """Starts fumi-edge with a TLS listener, a STARTTLS listener and metrics; nothing but log lines may come from it."""
    started: list[Program] = []
    cert, key = certificate

    def start(
        *flags: str,
        backend: Backend | str,
        certs: Sequence[str | Path] = ("--cert", cert, "--key", key),
        inherited: Sequence[int] = (),
    ) -> Program:
        address = backend if isinstance(backend, str) else backend.address
        everything = [*map(str, certs), "--backend", address, "--listen", "127.0.0.1:0"]
        everything += ["--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--health-interval", "0", *flags]
        started.append(Program(*everything, inherited=inherited))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each._reader.join(PATIENCE)
        assert each.noise == []
        assert not [entry for entry in each.logs if "traceback" in entry]


@pytest.fixture
def dial():
    """Connects to a Unix socket."""
    peers = []

    def dial(path, context=None):
        sock = socket.socket(socket.AF_UNIX)
        peers.append(Peer(sock))
        sock.connect(str(path))
        if context is not None:
            peers.append(Peer(context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)))
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


@pytest.fixture(params=["tls", "plaintext"])
def connect(request, clients):
    """Connects through the tunnel, over TLS or on the STARTTLS port without upgrading."""

    def connect(program, buffer=None):
        if request.param == "tls":
            return clients.tls(program.tls_port, buffer=buffer)
        client = clients.plain(program.starttls_port, buffer=buffer)
        assert client.line() == b"220 ready\r\n"
        client.say(b"BDAT\r\n")
        return client

    connect.tls = request.param == "tls"
    return connect


@pytest.fixture
def served(clients):
    """One client's session, from the banner to the end."""

    def served(program):
        client = clients.tls(program.tls_port)
        assert client.line().startswith(b"220 ")
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
        assert client.rest() == b""
        client.close()

    return served


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@pytest.fixture
def pool():
    def pool(*addresses, timeout=20.0, balance="leastconn"):
        destinations = tuple(Remote(parse_address(each)) for each in addresses)
        settings = BackendSettings(
            destinations, "off", balance, connect_timeout=timeout, health_interval=0.01, health_timeout=1.0
        )
        return Backends(settings, EdgeMetrics(CollectorRegistry(), [], "0"))

    return pool


@pytest.fixture
def shown(authority, clients):
    """The serial number of the certificate that a port shows now."""
    context = ssl.create_default_context(cafile=authority.path)

    def ask(program, name="localhost"):
        client = clients.tls(program.tls_port, name, context)
        number = client.sock.getpeercert()["serialNumber"]
        assert client.line().startswith(b"220")
        client.close()
        return number

    return ask


@pytest.fixture
def files(tmp_path):
    return tmp_path / "cert.pem", tmp_path / "key.pem"
