"""What the edge's tests share: a certificate, backends in threads, the real program, and clients."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fumi_core.proxy_protocol import ProxyHeader, parse
from fumi_core.runtime.addresses import parse_address
from fumi_edge.backends.choice import Backends
from fumi_edge.backends.dialing import Remote
from fumi_edge.metrics import EdgeMetrics
from tests.ports import kept_port
from tests.starter import start

PATIENCE = 30.0
"""Seconds until something that ought to happen is given up; nothing waits that long when all is well."""


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """Poll until the condition holds, and return what it gave."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)
    return value


class Peer:
    """A socket with lines: the backend's side of a connection, or a client."""

    def __init__(self, sock: socket.socket, buffered: bytes = b"") -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock
        self.header: ProxyHeader | None = None
        self._buffered = buffered

    def more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ssl.SSLZeroReturnError:
            return False
        self._buffered += data
        return bool(data)

    def line(self) -> bytes:
        """The next line with its end; what there was before the end of the stream."""
        while b"\n" not in self._buffered and self.more():
            pass
        line, end, self._buffered = self._buffered.partition(b"\n")
        return line + end

    def reply(self) -> list[bytes]:
        """The lines of one SMTP reply."""
        lines = [self.line()]
        while lines[-1][3:4] == b"-":
            lines.append(self.line())
        return lines

    def rest(self) -> bytes:
        """Everything up to the end of the stream."""
        pieces = [self._buffered]
        self._buffered = b""
        while self.more():
            pieces.append(self._buffered)
            self._buffered = b""
        return b"".join(pieces)

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, command: bytes) -> list[bytes]:
        self.say(command)
        return self.reply()

    def take_header(self) -> None:
        while (parsed := parse(self._buffered)) is None:
            if not self.more():
                raise EOFError
        self.header, used = parsed
        self._buffered = self._buffered[used:]

    def end(self) -> None:
        """End this side and leave the other open; over TLS, where Python cannot, without a close_notify."""
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def close(self) -> None:
        self.sock.close()


def smtp(peer: Peer) -> None:
    """A small SMTP server: answers 250 to everything, takes DATA, and keeps what it heard in ``peer.heard``."""
    peer.say(b"220 backend.test ESMTP\r\n")
    while line := peer.line():
        peer.heard.append(line)
        verb = line.split()[0].upper() if line.split() else b""
        if verb in (b"EHLO", b"LHLO"):
            peer.say(b"250-backend.test\r\n250-PIPELINING\r\n250 SIZE 1000\r\n")
        elif verb == b"DATA":
            peer.say(b"354 go ahead\r\n")
            while (content := peer.line()) not in (b".\r\n", b""):
                peer.heard.append(content)
            peer.say(b"250 2.0.0 queued\r\n")
        elif verb == b"QUIT":
            peer.say(b"221 2.0.0 bye\r\n")
            return
        else:
            peer.say(b"250 2.0.0 ok\r\n")


class Backend:
    """A backend in threads: ``handler`` is run with a Peer for every connection; ``peers`` are those that came, probes apart."""

    def __init__(self, handler: Callable[[Peer], None], proxy: bool = True, path: str | None = None) -> None:
        self._handler = handler
        self._proxy = proxy
        self._port = kept_port()
        if path:
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(path)
            self._listening.listen(64)
            self.address = f"unix:{path}"
        else:
            self._listening = socket.create_server(self._port.getsockname(), backlog=64)
            self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.peers: list[Peer] = []
        self.errors: list[Exception] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(Peer(sock),), daemon=True).start()

    def _serve(self, peer: Peer) -> None:
        peer.heard = []
        try:
            if self._proxy:
                peer.take_header()
            if peer.header is None or peer.header.command == "PROXY":
                self.peers.append(peer)
            self._handler(peer)
        except (OSError, EOFError):
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            peer.close()

    def peer(self, number: int = 0) -> Peer:
        until(lambda: len(self.peers) > number, "a connection to the backend")
        return self.peers[number]

    def close(self) -> None:
        """Be gone: who connects is refused."""
        # close() alone leaves the thread in accept() to take one more.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def give_up(self) -> None:
        """The port too."""
        self.close()
        self._port.close()


def open_files(pid: int) -> set[str]:
    """What a process has open, as /proc calls it; nothing of one that has gone."""
    files = set()
    with contextlib.suppress(FileNotFoundError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            files.add(os.readlink(fd))
    return files


class Program:
    """The real fumi-edge, logging JSON."""

    def __init__(self, *flags: str, cwd: Path | None = None, inherited: Sequence[int] = ()) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FUMI_")}
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        self.stdout, self._stderr = os.fdopen(out), os.fdopen(err)
        arguments = ("--log-format", "json", *flags)
        self.process = start("fumi-edge", *arguments, stdout=stdout, stderr=stderr, cwd=cwd, env=environment, inherited=inherited)
        os.close(stdout)
        os.close(stderr)
        self.logs: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_until_started("--metrics" in flags or "--dev" in flags)

    def _read(self) -> None:
        for line in self._stderr:
            try:
                self.logs.append(json.loads(line))
            except ValueError:
                self.noise.append(line)

    def _wait_until_started(self, metrics: bool) -> None:
        last = "serving metrics" if metrics else "listening"
        until(lambda: self.events(last) or self.process.poll() is not None, "the start of the edge")
        if self.process.poll() is not None:
            self._reader.join(PATIENCE)  # for its last words
        assert self.process.poll() is None, self.noise
        if metrics and self.events("serving metrics")[0].get("port"):
            # The log tells of sockets that are bound; what serves them is there when somebody answers.
            self.fetch("/healthz")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.logs if entry["event"] == name]

    def _port(self, mode: str) -> int:
        found = until(lambda: [entry for entry in self.events("listening") if entry["mode"] == mode], f"a {mode} listener")
        return int(found[0]["listener"].rpartition(":")[2])

    @property
    def tls_port(self) -> int:
        return self._port("tls")

    @property
    def starttls_port(self) -> int:
        return self._port("starttls")

    def fetch(self, path: str) -> tuple[int, str]:
        url = "http://127.0.0.1:{}{}".format(self.events("serving metrics")[0]["port"], path)
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str, /, **labels: str) -> float:
        """One sample of /metrics; all the given labels must be there, others may."""
        for line in self.fetch("/metrics")[1].splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                have = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if labels.items() <= have.items():
                    return float(found[3])
        raise LookupError(f"{name} {labels}")

    def ended(self, count: int = 1) -> list[dict[str, Any]]:
        """The log lines of connections that have ended, once there are so many."""
        until(lambda: len(self.events("connection ended")) >= count, f"the end of {count} connections")
        return self.events("connection ended")

    def workers(self) -> set[int]:
        """The pids of the processes that serve clients: the master's children that have the listening socket."""
        pid, port = self.process.pid, f":{self.tls_port:04X}"
        # The kernel's table may be thousands of lines long.
        sockets = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines() if port in line)
        listening = {f"socket:[{words[9]}]" for words in sockets if words[1].endswith(port) and words[3] == "0A"}
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {int(child) for child in children if listening & open_files(int(child))}

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def rests(self) -> bool:
        """Whether its event loop sleeps: it has done all that there was to do, and does not just wait for the processor."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        """End whatever is left of it, workers too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Clients:
    """Makes clients of 127.0.0.1 and closes them in the end."""

    def __init__(self, authority: Path) -> None:
        self._authority = authority
        self._peers: list[Peer] = []

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._authority))

    def plain(self, port: int, buffer: int | None = None) -> Peer:
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", port))
        return self._keep(Peer(sock))

    def tls(self, port: int, name: str = "localhost", context: ssl.SSLContext | None = None, buffer: int | None = None) -> Peer:
        return self.upgrade(self.plain(port, buffer), name, context)

    def upgrade(self, peer: Peer, name: str = "localhost", context: ssl.SSLContext | None = None) -> Peer:
        # With ragged ends not suppressed, a stream that ends without close_notify is an error.
        sock = (context or self.context()).wrap_socket(peer.sock, server_hostname=name, suppress_ragged_eofs=False)
        return self._keep(Peer(sock))

    def _keep(self, peer: Peer) -> Peer:
        self._peers.append(peer)
        return peer

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


def s_client(port: int, *flags: str | Path, starttls: bool = False, say: str = "QUIT\r\n", letters: bool = False) -> str:
    """What openssl s_client prints until the connection ends. With ``letters`` what it is to say are commands to itself."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *map(str, flags)]
    command += ["-starttls", "smtp"] if starttls else []
    command += [] if letters else ["-ign_eof"]
    # Said before it starts, since it may end before it listens; and its input stays open, since its end would end it.
    listening, saying = os.pipe()
    os.write(saying, say.encode())
    with subprocess.Popen(command, stdin=listening, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        os.close(listening)
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        watchdog.cancel()
    os.close(saying)
    assert process.returncode >= 0, printed
    return printed


class Kit:
    """The names above, for test modules, which cannot import this one."""

    Peer = Peer
    Program = Program
    smtp = staticmethod(smtp)
    s_client = staticmethod(s_client)
    until = staticmethod(until)
    hash = staticmethod(lambda data: hashlib.sha256(data).hexdigest())


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def make_certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes a self-signed certificate for the names given; returns the paths of certificate and key."""
    assert shutil.which("openssl"), "these tests need the openssl program"

    def make(*names: str, options: tuple[str, ...] = ("-days", "2")) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp("certificate")
        key, cert = directory / "key.pem", directory / "cert.pem"
        alternatives = ",".join(f"IP:{name}" if name[0].isdigit() else f"DNS:{name}" for name in names)
        subprocess.run(
            ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", key,
             "-out", cert,
             "-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={alternatives}", *options],
            check=True,
            capture_output=True,
        )  # fmt: skip
        return cert, key

    return make


SETTINGS = """
[ca]
default_ca = here
[here]
database = {directory}/index
serial = {directory}/serial
new_certs_dir = {directory}
default_md = sha256
unique_subject = no
policy = anything
[anything]
commonName = supplied
"""


class Authority:
    """A certificate authority of the openssl program, with its own certificate in ``path``."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._number = 0
        self.path, self._key = directory / "ca.pem", directory / "ca.key"
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        made = ("-keyout", self._key, "-out", self.path, "-subj", f"/CN={name}")
        self._openssl("req", "-x509", "-nodes", *self._new("ec"), *usage, *made)

    def issue(
        self, *names: str, kind: str = "ec", days: float = 2, alternative: str = "", is_ca: bool = False
    ) -> tuple[Path, Path]:
        """A certificate for the names, the first one its CN, with an "ec" or an "rsa" key; the paths of both, new each time."""
        self._number += 1
        cert, key = (self._directory / f"{self._number}.{end}" for end in ("pem", "key"))
        request, extensions, settings = (self._directory / name for name in ("request", "extensions", "settings"))
        self._openssl("req", "-utf8", "-nodes", *self._new(kind), "-keyout", key, "-out", request, "-subj", f"/CN={names[0]}")
        alternative = alternative or ",".join(f"DNS:{name}" for name in names)
        extensions.write_text(f"authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\nsubjectAltName={alternative}\n")
        if is_ca:
            extensions.write_text("basicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=hash\n")
        settings.write_text(SETTINGS.format(directory=self._directory))
        (self._directory / "serial").write_text(f"{1000 + self._number:04X}")
        (self._directory / "index").touch()
        now = datetime.now(UTC)
        begin, end = (f"{moment:%Y%m%d%H%M%SZ}" for moment in (now - timedelta(days=9 if days < 0 else 0), now + timedelta(days)))
        # Not x509, which takes a number of days only, and in newer versions none that lie in the past.
        ca = ("-batch", "-notext", "-config", settings, "-cert", self.path, "-keyfile", self._key, "-extfile", extensions)
        self._openssl("ca", *ca, "-startdate", begin, "-enddate", end, "-in", request, "-out", cert)
        return cert, key

    @staticmethod
    def _new(kind: str) -> tuple[str, ...]:
        return ("-newkey", "rsa:2048") if kind == "rsa" else ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")

    @staticmethod
    def _openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="session")
def make_authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    return lambda name="Test CA": Authority(tmp_path_factory.mktemp("authority"), name)


@pytest.fixture(scope="session")
def authority(make_authority: Callable[..., Authority]) -> Authority:
    return make_authority()


@pytest.fixture(scope="session")
def certificate(make_certificate: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return make_certificate("localhost", "127.0.0.1")


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
        metrics = EdgeMetrics(CollectorRegistry(), [], "0")
        return Backends([Remote(parse_address(each)) for each in addresses], timeout, metrics, balance)

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
