"""What the tests with programs of others share: a core that knows one user, an edge in front of a core, readers of ops/."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fumi_core import AuthContext, DataContext, Fumi, Next, RcptContext
from fumi_core import cli as core_program
from fumi_core.testing import RunningServer, running
from fumi_edge import cli as edge_program
from tests.interop.starting import ClientCertificate, Edge, StartCore, StartEdge, StartFumiCore, StartHAProxy, StartStunnel
from tests.support.certificates import CertificateFiles, new_key, openssl
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN, Process


async def _let_joe_in(ctx: AuthContext, next: Next) -> None:
    known = ctx.credentials.validate_password("secret") or ctx.credentials.access_token == "token"
    if ctx.credentials.username == "joe" and known:
        ctx.accept("joe")


def _nobody_is_unknown(ctx: RcptContext, next: Next) -> Awaitable[None]:
    if ctx.address.address.startswith("nobody@"):
        ctx.reject("No such user")
    return next()


async def _full_is_full(ctx: DataContext, next: Next) -> None:
    for each in ctx.session.envelope.rcpt_to:
        if each.address.startswith("full@"):
            ctx.reject_recipient(each.address, "4.2.2 Mailbox full", 452)
    await next()


@pytest.fixture
def core() -> Iterator[StartCore]:
    """Runs a core that lets joe in, by his password or his token, and knows no nobody@; in LMTP, full@ gets no mail."""
    with contextlib.ExitStack() as servers:

        def start(**options: Any) -> RunningServer:
            methods = ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2")
            usual = {"auth_optional": True, "auth_methods": methods, "allow_insecure_auth": True, "name": "mx.example"}
            app = Fumi(**{**usual, "close_timeout": 0.2, **options})
            app.on_auth(_let_joe_in)
            app.on_rcpt_to(_nobody_is_unknown)
            if app.options.lmtp:
                app.on_data(_full_is_full)
            return servers.enter_context(running(app))

        yield start


@pytest.fixture
def edge(programs: Programs, certificate: CertificateFiles) -> StartEdge:
    """fumi-edge in front of a core that wants a PROXY header."""

    def start(core_port: int, *flags: str) -> Edge:
        ports = Edge(free_port(), free_port())
        command = ["--cert", str(certificate[0]), "--key", str(certificate[1]), "--backend", f"127.0.0.1:{core_port}"]
        command += ["--listen", f"127.0.0.1:{ports.tls_port}", "--starttls-listen", f"127.0.0.1:{ports.starttls_port}", *flags]
        programs.start(BIN / "fumi-edge", *command, port=ports.starttls_port, log="edge.log")
        return ports

    return start


@pytest.fixture(scope="session")
def parse_flags() -> Callable[[list[str]], dict[str, Any]]:
    """What a program makes of its command line, were it run; an error of the program when it would not run."""

    def parse(command: list[str]) -> dict[str, Any]:
        program = {"fumi-core": core_program.main, "fumi-edge": edge_program.main}[Path(command[0]).name]
        settings: dict[str, Any] = program.make_context(command[0], command[1:]).params
        return settings

    return parse


TEMPLATES = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def client_certificate(tmp_path_factory: pytest.TempPathFactory) -> ClientCertificate:
    directory = tmp_path_factory.mktemp("client")
    made = ClientCertificate(directory / "ca.pem", directory / "client.pem", directory / "client.key")
    authority = ("-x509", "-days", "2", "-subj", "/CN=Test CA", "-keyout", directory / "ca.key", "-out", made.ca)
    leaf = ("-subj", "/CN=client.example", "-keyout", made.key, "-out", directory / "client.csr")
    signed = ("-CA", made.ca, "-CAkey", directory / "ca.key", "-CAcreateserial", "-days", "2", "-out", made.cert)
    (directory / "leaf.cnf").write_text("keyUsage=digitalSignature\nextendedKeyUsage=clientAuth\nauthorityKeyIdentifier=keyid\n")
    openssl("req", *new_key("ec"), "-nodes", *authority)
    openssl("req", *new_key("ec"), "-nodes", *leaf)
    openssl("x509", "-req", "-in", directory / "client.csr", "-extfile", directory / "leaf.cnf", *signed)
    return made


@pytest.fixture
def haproxy(programs: Programs, certificate: CertificateFiles) -> StartHAProxy:
    """Starts HAProxy with a file of haproxy/ as it is, checked before; the variables are named without their FUMI_."""

    def start(name: str, port: int, log: str = "haproxy.log", flags: Sequence[str] = (), **variables: object) -> Process:
        path = TEMPLATES / "haproxy" / name
        # What runs as somebody else cannot read what pytest's directories keep to their owner; HAProxy reads before.
        usual = {"CERT": certificate[0].with_name("both.pem"), "METRICS": f"127.0.0.1:{free_port()}"}
        environment = [f"FUMI_{key}={value}" for key, value in {**usual, **variables}.items()]
        said = programs.run("env", *environment, "haproxy", "-c", "-f", path)
        assert "WARNING" not in said, said
        return programs.start("env", *environment, "haproxy", *flags, "-f", path, port=port, log=log)

    return start


@pytest.fixture
def stunnel(programs: Programs, certificate: CertificateFiles) -> StartStunnel:
    """Starts stunnel with a file of stunnel/ by stunnel/run; the variables are named without their FUMI_."""

    def start(name: str, port: int, log: str = "stunnel.log", **variables: object) -> Process:
        usual = {"CERT": certificate[0].with_name("both.pem")}
        environment = [f"FUMI_{key}={value}" for key, value in {**usual, **variables}.items()]
        return programs.start("env", *environment, TEMPLATES / "stunnel" / "run", name, port=port, log=log)

    return start


@pytest.fixture
def fumi_core(programs: Programs) -> StartFumiCore:
    """Starts fumi-core, with a Maildir and a log by its name; its port."""

    def start(*flags: str, name: str = "core", port: int | None = None) -> tuple[int, Process]:
        port = port or free_port()
        deliver = [] if "--deliver" in flags else ["--deliver", f"maildir:{name}"]
        # Of its own, since a machine may have none, which is worth a warning.
        named = [] if "--name" in flags else ["--name", "core.example"]
        command = ["--listen", f"127.0.0.1:{port}", *named, *deliver, *flags]
        return port, programs.start(BIN / "fumi-core", *command, port=port, log=f"{name}.log")

    return start
