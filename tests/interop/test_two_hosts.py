"""The README's recipe for a core on another host: TLS with certificates on both sides, by each of the three programs there."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable

import pytest

from tests.interop.starting import StartCore
from tests.interop.test_edge_readme import SECTIONS, Kitchen, send
from tests.interop.test_edge_readme import core as core
from tests.interop.test_edge_readme import kitchen as kitchen
from tests.support.certificates import Authority, CertificateFiles, MakeAuthority
from tests.support.readme import ROOT, blocks, sh
from tests.support.waiting import until

TITLE = "A core on another host, over TLS"
HERE = ("10.0.0.2", "127.0.0.1")
MAKING, EDGE, RECEIVER = (text for kind, text in blocks(SECTIONS[TITLE]) if kind == "sh")
PROGRAMS = ("fumi-edge", "stunnel", "haproxy")
NAME = "core.example.org"


@pytest.fixture(scope="module")
def make_authority(tmp_path_factory: pytest.TempPathFactory) -> MakeAuthority:
    return lambda name="Test CA": Authority(tmp_path_factory.mktemp("authority"), name)


@pytest.fixture(scope="module")
def ours(make_authority: MakeAuthority) -> Authority:
    return make_authority()


@pytest.fixture(scope="module")
def strangers(make_authority: MakeAuthority) -> Authority:
    return make_authority("Unknown CA")


def receive(kitchen: Kitchen, program: str) -> None:
    """Start what unwraps TLS on the host of the core."""
    port = kitchen.ports["2465"]
    if program == "fumi-edge":
        kitchen.cook(RECEIVER, HERE, port="2465")
        return
    (text,) = (text for kind, text in blocks(SECTIONS[TITLE]) if kind == {"stunnel": "ini", "haproxy": "haproxy"}[program])
    path = kitchen.directory / f"{program}.conf"
    path.write_text(kitchen.here(text, HERE))
    command = ("stunnel", path) if program == "stunnel" else ("haproxy", "-db", "-f", path)
    kitchen.programs.start(*command, port=port, log=f"{program}.log")


def put(kitchen: Kitchen, ca: Authority, server: CertificateFiles, client: CertificateFiles) -> None:
    """The files of the recipe."""
    private = kitchen.directory / "private"
    private.mkdir()
    shutil.copy(ca.path, private / "ca.pem")
    for name, pair in ((f"{NAME}.pem", server), ("edge-client.pem", client)):
        (private / name).write_bytes(pair[0].read_bytes() + pair[1].read_bytes())


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_recipe_carries_a_message_with_the_clients_own_tls(kitchen: Kitchen, core: StartCore, program: str) -> None:
    core()
    sh(MAKING.replace("ops/", f"{ROOT}/ops/"), kitchen.directory)
    receive(kitchen, program)
    kitchen.cook(EDGE, HERE, port="25")
    kitchen.context.maximum_version = ssl.TLSVersion.TLSv1_2
    send(kitchen.tls())
    send(kitchen.starttls())
    send(kitchen.plain())
    assert [session.secure for session in kitchen.sessions] == [True, True, False]
    assert {session.remote_address for session in kitchen.sessions} == {"127.0.0.9"}
    for session in kitchen.sessions[:2]:
        assert session.tls
        # The connection between the hosts has TLS 1.3, and a certificate.
        assert (session.tls.version, session.tls.sni, session.tls.client_cert) == ("TLSv1.2", "localhost", False)
    assert "backend down" not in kitchen.log()


Make = Callable[[Authority, Authority], tuple[CertificateFiles, CertificateFiles]]


def server(authority: Authority, name: str = NAME, days: float = 2, begins: float = 0) -> CertificateFiles:
    return authority.issue(name, days=days, begins=begins, usage="serverAuth")


def client(authority: Authority, days: float = 2) -> CertificateFiles:
    return authority.issue("edge", days=days, usage="clientAuth")


BAD: dict[str, tuple[Make, str]] = {
    "a forged one of the core": (lambda ours, others: (server(others), client(ours)), "it is not from a CA in private/ca.pem"),
    "an expired one of the core": (lambda ours, others: (server(ours, days=-1), client(ours)), "certificate has expired"),
    "one of the core from tomorrow on": (
        lambda ours, others: (server(ours, begins=1), client(ours)),
        "certificate is not yet valid",
    ),
    "another name of the core": (
        lambda ours, others: (server(ours, "other.example.org"), client(ours)),
        f"it is not for {NAME}",
    ),
    "a client's of the core": (
        lambda ours, others: (ours.issue(NAME, usage="clientAuth"), client(ours)),
        "unsuitable certificate purpose",
    ),
    "a forged one of the edge": (lambda ours, others: (server(ours), client(others)), "rejected the certificate in private/edge"),
    "an expired one of the edge": (
        lambda ours, others: (server(ours), client(ours, days=-1)),
        "rejected the certificate in private/edge",
    ),
    "none of the edge": (lambda ours, others: (server(ours), client(ours)), "requires a certificate: name one"),
}


# fumi-edge itself refuses to start with a certificate that is not for servers.
CASES = [(program, bad) for bad in BAD for program in PROGRAMS if (program, bad) != ("fumi-edge", "a client's of the core")]


@pytest.mark.long
@pytest.mark.parametrize(("program", "bad"), CASES)
def test_a_message_does_not_pass_with(
    kitchen: Kitchen, core: StartCore, ours: Authority, strangers: Authority, program: str, bad: str
) -> None:
    make, why = BAD[bad]
    running = core()
    put(kitchen, ours, *make(ours, strangers))
    receive(kitchen, program)
    changes = [HERE, (" --backend-cert private/edge-client.pem", "")] if bad == "none of the edge" else [HERE]
    kitchen.cook(EDGE, *changes, port="25")
    with kitchen.tls_socket() as client:
        assert client.recv(100) == b"421 4.3.2 Service not available, closing connection\r\n"
    until(lambda: why in kitchen.log(), why)
    until(lambda: "backend down" in kitchen.log(), "the line about the backend")
    assert "reason=certificate" in kitchen.log()
    assert running.messages == []


def test_haproxy_with_what_is_emitted_for_the_recipe_does_the_same_as_its_edge(kitchen: Kitchen, core: StartCore) -> None:
    core()
    sh(MAKING.replace("ops/", f"{ROOT}/ops/"), kitchen.directory)
    receive(kitchen, "fumi-edge")
    (kitchen.directory / "cert.pem.key").symlink_to("key.pem")
    path = kitchen.directory / "front.cfg"
    path.write_text(sh(f"{kitchen.here(EDGE, HERE).strip()} --emit haproxy", kitchen.directory))
    assert "verifyhost" in path.read_text()
    kitchen.programs.start("haproxy", "-db", "-f", path, port=kitchen.ports["465"], log="front.log")
    kitchen.context.maximum_version = ssl.TLSVersion.TLSv1_2
    send(kitchen.tls())
    (session,) = kitchen.sessions
    assert session.tls
    assert (session.tls.version, session.tls.sni, session.remote_address) == ("TLSv1.2", "localhost", "127.0.0.9")
