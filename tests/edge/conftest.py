"""What the edge's tests share: a certificate, backends in threads, the real program, and clients."""

from __future__ import annotations

import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from fumi_core.runtime.addresses import parse_address
from fumi_edge.backends.choice import Backends
from fumi_edge.backends.dialing import Remote
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.metrics import EdgeMetrics
from tests.edge.backends import Backend, Handler, MakePool, StartBackend, smtp
from tests.edge.clients import Clients, Connect, Dial, Greet
from tests.edge.program import Program, StartEdge
from tests.support.certificates import Authority, CertificateFiles, MakeAuthority, MakeCertificate, self_signed, shown_serial
from tests.support.peer import Peer
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="session")
def make_certificate(tmp_path_factory: pytest.TempPathFactory) -> MakeCertificate:
    """Makes a self-signed certificate for the names given; returns the paths of certificate and key."""

    def make(*names: str, options: tuple[str, ...] = ("-days", "2")) -> CertificateFiles:
        return self_signed(tmp_path_factory.mktemp("certificate"), *names, options=options)

    return make


@pytest.fixture(scope="session")
def make_authority(tmp_path_factory: pytest.TempPathFactory) -> MakeAuthority:
    def make(name: str = "Test CA") -> Authority:
        return Authority(tmp_path_factory.mktemp("authority"), name)

    return make


@pytest.fixture(scope="session")
def authority(make_authority: MakeAuthority) -> Authority:
    return make_authority()


@pytest.fixture
def clients(certificate: CertificateFiles) -> Iterator[Clients]:
    clients = Clients(certificate[0])
    yield clients
    clients.close()


@pytest.fixture
def backend() -> Iterator[StartBackend]:
    """Starts backends; fails the test when a handler raised."""
    started: list[Backend] = []

    def start(
        handler: Handler = smtp, *, proxy: bool = True, path: str | None = None, tls: ssl.SSLContext | None = None
    ) -> Backend:
        started.append(Backend(handler, proxy, path, tls))
        return started[-1]

    yield start
    for each in started:
        each.give_up()
        assert each.errors == []


@pytest.fixture
def edge(certificate: CertificateFiles) -> Iterator[StartEdge]:
    """Starts fumi-edge with a TLS listener, a STARTTLS listener and metrics; nothing but log lines may come from it."""
    started: list[Program] = []
    cert, key = certificate

    def start(
        *flags: str,
        backend: Backend | str,
        certs: Sequence[str | Path] = ("--cert", cert, "--key", key),
        inherited: Sequence[int] = (),
        prefix: Sequence[str | Path] = (),
    ) -> Program:
        address = backend if isinstance(backend, str) else backend.address
        everything = [*map(str, certs), "--backend", address, "--listen", "127.0.0.1:0"]
        everything += ["--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--health-interval", "0", *flags]
        started.append(Program(*everything, inherited=inherited, prefix=prefix))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each._reader.join(PATIENCE)
        assert each.noise == []
        assert not [entry for entry in each.logs if "traceback" in entry]


@pytest.fixture
def dial() -> Iterator[Dial]:
    """Connects to a Unix socket."""
    peers: list[Peer] = []

    def dial(path: Path, context: ssl.SSLContext | None = None) -> Peer:
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
def greeted(clients: Clients) -> Greet:
    """A client that has the banner."""

    def greeted(program: Program) -> Peer:
        client = clients.plain(program.starttls_port)
        assert client.reply()[-1].startswith(b"220")
        return client

    return greeted


@pytest.fixture
def public(certificate: CertificateFiles) -> Iterator[CertificateFiles]:
    """A certificate that all users can read, and its key that only the owner can; pytest's directories are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        cert, key = Path(name, "cert.pem"), Path(name, "key.pem")
        for source, path, mode in ((certificate[0], cert, 0o644), (certificate[1], key, 0o600)):
            path.write_bytes(source.read_bytes())
            path.chmod(mode)
        yield cert, key


@pytest.fixture(params=["tls", "plaintext"])
def connect(request: pytest.FixtureRequest, clients: Clients) -> Connect:
    """Connects through the tunnel, over TLS or on the STARTTLS port without upgrading."""
    return Connect(clients, tls=request.param == "tls")


@pytest.fixture
def served(clients: Clients) -> Callable[[Program], None]:
    """One client's session, from the banner to the end."""

    def served(program: Program) -> None:
        client = clients.tls(program.tls_port)
        assert client.line().startswith(b"220 ")
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
        assert client.rest() == b""
        client.close()

    return served


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of a server that accepts connections into its backlog."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@pytest.fixture
def pool() -> MakePool:
    """Makes the Backends of an edge, in this process."""

    def pool(*addresses: str, timeout: float = 20.0, balance: str = "leastconn") -> Backends:
        destinations = tuple(Remote(parse_address(each)) for each in addresses)
        settings = BackendSettings(
            destinations, "off", balance, connect_timeout=timeout, health_interval=0.01, health_timeout=1.0
        )
        return Backends(settings, EdgeMetrics(CollectorRegistry(), [], "0"))

    return pool


@pytest.fixture
def shown(authority: Authority, clients: Clients) -> Callable[..., str]:
    """The serial number of the certificate that a port shows now."""
    context = ssl.create_default_context(cafile=authority.path)

    def ask(program: Program, name: str = "localhost") -> str:
        client = clients.tls(program.tls_port, name, context)
        number = shown_serial(client.tls)
        assert client.line().startswith(b"220")
        client.close()
        return number

    return ask


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    """Where a certificate and its key are put, and replaced."""
    return tmp_path / "cert.pem", tmp_path / "key.pem"
