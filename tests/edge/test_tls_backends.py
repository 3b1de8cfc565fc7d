"""Backends over TLS: what is verified, what the backend gets, the sessions that are resumed, and the settings."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from fumi_edge.backends.tls import BackendTLS
from fumi_edge.tls.credentials import ClientSettings, Credentials
from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.metrics import errors
from tests.edge.program import Program, StartEdge, run
from tests.support.certificates import Authority, CertificateFiles, MakeAuthority, MakeCertificate
from tests.support.peer import Peer
from tests.support.waiting import until

HERE = ("localhost", "127.0.0.1")
ALTERNATIVE = "DNS:localhost,IP:127.0.0.1"
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


def context(pair: CertificateFiles, clients: Authority | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A backend's: shows this certificate, and requires one of these clients if they are given."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(*pair)
    if clients:
        made.load_verify_locations(clients.path)
        made.verify_mode = ssl.CERT_REQUIRED
    if version:
        made.minimum_version = made.maximum_version = version
    return made


@pytest.fixture(scope="session")
def strangers(make_authority: MakeAuthority) -> Authority:
    return make_authority("Unknown CA")


@pytest.fixture(scope="session")
def pair(authority: Authority) -> CertificateFiles:
    """A good backend's."""
    return authority.issue("localhost", alternative=ALTERNATIVE)


def session(program: Program, clients: Clients) -> None:
    """One client's, from the banner to the end, over TLS."""
    client = clients.tls(program.tls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    client.close()


def test_the_proxy_header_is_the_first_thing_inside_tls(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    server = backend(tls=context(pair))
    program = edge("--backend-ca", str(authority.path), backend=server)
    session(program, clients)
    assert server.peer().header.tls is not None
    (line,) = program.ended()
    assert (line["backend"], line["reason"], "error" in line) == (server.address, "backend_closed", False)
    assert server.address.startswith("tls:127.0.0.1:")


def test_a_client_that_upgrades_has_two_connections_over_tls(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    server = backend(tls=context(pair))
    program = edge("--backend-ca", str(authority.path), backend=server)
    client = clients.plain(program.starttls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert b"250 STARTTLS\r\n" in client.ask(b"EHLO me\r\n") or b"250-STARTTLS\r\n" in client.ask(b"EHLO me\r\n")
    client = clients.starttls(client)
    assert client.ask(b"EHLO me\r\n")[0] == b"250-backend.test\r\n"
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    until(lambda: len(server.peers) == 2, "the second connection")
    assert [peer.header.tls is None for peer in server.peers] == [True, False]


def test_a_client_that_does_not_upgrade_is_served_by_a_backend_over_tls(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    server = backend(tls=context(pair))
    program = edge("--backend-ca", str(authority.path), backend=server)
    client = clients.plain(program.starttls_port)
    assert client.line().startswith(b"220")
    assert client.ask(b"MAIL FROM:<a@b.example>\r\n") == [b"250 2.0.0 ok\r\n"]
    assert client.ask(b"DATA\r\n") == [b"354 go ahead\r\n"]
    client.say(b"x" * 300_000 + b"\r\n.\r\n")
    assert client.reply() == [b"250 2.0.0 queued\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""


@pytest.mark.parametrize("version", VERSIONS)
def test_sessions_are_resumed(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    authority: Authority,
    pair: CertificateFiles,
    version: ssl.TLSVersion,
) -> None:
    server = backend(tls=context(pair, version=version))
    program = edge("--backend-ca", str(authority.path), backend=server)
    for _ in range(5):
        session(program, clients)
    program.ended(5)
    assert server.resumed == 4


def expired(authority: Authority) -> CertificateFiles:
    return authority.issue("localhost", alternative=ALTERNATIVE, days=-1)


REJECTED: dict[str, tuple[Callable[[Authority, Authority], CertificateFiles], str]] = {
    "expired": (lambda ours, others: expired(ours), "certificate has expired"),
    "from tomorrow on": (
        lambda ours, others: ours.issue("localhost", alternative=ALTERNATIVE, begins=1),
        "certificate is not yet valid",
    ),
    "another CA": (lambda ours, others: others.issue("localhost", alternative=ALTERNATIVE), "it is not from a CA in {ca} ("),
    "another name": (lambda ours, others: ours.issue("other.example"), "it is not for 127.0.0.1;"),
    "its name as a common name only": (
        lambda ours, others: ours.issue("127.0.0.1", alternative="email:a@b.example"),
        "it is not for 127.0.0.1;",
    ),
    "for clients only": (
        lambda ours, others: ours.issue("localhost", alternative=ALTERNATIVE, usage="clientAuth"),
        "unsuitable certificate purpose",
    ),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_a_backend_is_not_used_whose_certificate_is(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, strangers: Authority, kind: str
) -> None:
    make, why = REJECTED[kind]
    why = "its certificate was rejected: " + why.format(ca=authority.path)
    server = backend(tls=context(make(authority, strangers)))
    flags = ("--backend-ca", str(authority.path))
    program = edge(*flags, backend=server)
    client = clients.tls(program.tls_port)
    assert client.line() == b"421 4.3.2 Service not available, closing connection\r\n"
    assert client.rest() == b""
    client.close()
    (line,) = program.ended()
    assert (line["reason"], why in line["error"]) == ("no_backend", True), line
    assert errors(program, server, "certificate") == 1
    status, said = program.fetch("/readyz")
    assert (status, f"backend {server.address}: {why}" in said) == (503, True), said
    assert until(lambda: program.events("backend down"))[0]["reason"] == "certificate"
    assert server.peers == []
    cert, key = clients.authority, clients.authority.with_name("key.pem")
    status, lines = run("--cert", cert, "--key", key, "--listen", "127.0.0.1:0", "--backend", server.address, *flags, "--check")
    assert (status, why in lines[0]) == (2, True), lines


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("own", ["none", "expired", "another CA"])
def test_a_backend_that_rejects_our_certificate_is_not_used(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    authority: Authority,
    strangers: Authority,
    pair: CertificateFiles,
    own: str,
    version: ssl.TLSVersion,
) -> None:
    shown = None if own == "none" else expired(authority) if own == "expired" else strangers.issue("edge")
    server = backend(tls=context(pair, authority, version))
    flags = [] if shown is None else ["--backend-cert", str(shown[0]), "--backend-key", str(shown[1])]
    program = edge("--backend-ca", str(authority.path), *flags, backend=server)
    client = clients.tls(program.tls_port)
    assert client.line() == b"421 4.3.2 Service not available, closing connection\r\n"
    client.close()
    (line,) = program.ended()
    if shown is not None:
        assert f"rejected the certificate in {shown[0]}" in line["error"]
    elif version is ssl.TLSVersion.TLSv1_3:
        assert "requires a certificate: name one with --backend-cert" in line["error"]
    else:
        assert "it may require a certificate: --backend-cert" in line["error"]
    assert line["reason"] == "no_backend"
    reason = "tls" if shown is None and version is ssl.TLSVersion.TLSv1_2 else "certificate"
    assert errors(program, server, reason) == 1
    assert line["error"] in program.fetch("/readyz")[1]
    assert bool(program.events("certificate for backends is not valid")) is (own == "expired")


def test_both_sides_show_a_certificate(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    own = authority.issue("edge.example", usage="clientAuth")
    server = backend(tls=context(pair, authority))
    program = edge(
        *("--backend-ca", str(authority.path), "--backend-cert", str(own[0]), "--backend-key", str(own[1])), backend=server
    )
    session(program, clients)
    assert "edge.example" in server.shown[0]
    assert program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="edge.example") > 0


def test_a_name_of_its_own_is_requested_and_verified(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority
) -> None:
    names: list[str | None] = []
    made = context(authority.issue("core.example"))
    made.sni_callback = lambda sock, name, context: names.append(name)
    program = edge("--backend-ca", str(authority.path), "--backend-name", "core.example", backend=backend(tls=made))
    session(program, clients)
    assert names == ["core.example"]


def test_plain_backends_and_tls_backends_mix(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    plain, over_tls = backend(), backend(tls=context(pair))
    program = edge(
        *("--backend-ca", str(authority.path), "--backend", over_tls.address, "--balance", "roundrobin"), backend=plain
    )
    for _ in range(4):
        session(program, clients)
    assert (len(plain.peers), len(over_tls.peers)) == (2, 2)


def test_the_next_backend_is_tried_when_tls_fails(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, strangers: Authority, pair: CertificateFiles
) -> None:
    wrong, well = backend(tls=context(strangers.issue(*HERE, alternative=ALTERNATIVE))), backend(tls=context(pair))
    program = edge(*("--backend-ca", str(authority.path), "--backend", well.address, "--balance", "first"), backend=wrong)
    session(program, clients)
    assert len(well.peers) == 1


def test_health_checks_are_made_over_tls(
    backend: StartBackend, edge: StartEdge, authority: Authority, pair: CertificateFiles
) -> None:
    heard: list[bytes] = []

    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        heard.append(peer.line())
        peer.say(b"221 bye\r\n")

    server = backend(handler, tls=context(pair))
    program = edge("--health-interval", "0.05", "--backend-ca", str(authority.path), backend=server)
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    until(lambda: len(heard) > 3, "some checks")
    program.stop()
    assert (set(heard), server.peers) == ({b"QUIT\r\n"}, [])
    assert server.resumed >= len(heard) - 1


WRONG = {
    "a CA without TLS": (("--backend", "127.0.0.1:1", "--backend-ca", "{ca}"), "--backend-ca is for backends over TLS"),
    "a name without TLS": (("--backend", "127.0.0.1:1", "--backend-name", "x"), "--backend-name is for backends over TLS"),
    "a certificate without TLS": (("--backend", "127.0.0.1:1", "--backend-cert", "x"), "--backend-cert is for backends"),
    "no host": (("--backend", "tls::465"), "names no host"),
    "a Unix socket": (("--backend", "tls:unix:/x"), "names no host"),
    "port 0": (("--backend", "tls:a:0"), "tls:a:0 is not a backend"),
    "no such CA": (("--backend", "tls:a:1", "--backend-ca", "nowhere"), "nowhere: cannot read the backend CA"),
    "a CA that is none": (("--backend", "tls:a:1", "--backend-ca", "{key}"), "{key}: holds no PEM certificate"),
    "no key": (
        ("--backend", "tls:a:1", "--backend-cert", "{ca}"),
        "{ca}: holds no private key; name its file with --backend-key",
    ),
    "a key alone": (("--backend", "tls:a:1", "--backend-key", "{key}"), "--backend-key without --backend-cert"),
    "a key of another": (
        ("--backend", "tls:a:1", "--backend-cert", "{ca}", "--backend-key", "{key}"),
        "{key}: the private key does not belong to the certificate in {ca}",
    ),
    "a name that is none": (("--backend", "tls:a:1", "--backend-name", ".x"), "--backend-name: '.x' is not a host name"),
    "a name with a wildcard": (("--backend", "tls:a:1", "--backend-name", "*.x"), "--backend-name: '*.x' is not a host name"),
    "a name that is too long for SNI": (("--backend", "tls:a:1", "--backend-name", "a." * 130), "' is not a host name"),
    "a host that no certificate can be for": (("--backend", "tls:127.1:465"), "tls:127.1:465: '127.1' is not a host name"),
    "with an app": (("--backend-ca", "{ca}", "x:app"), "--backend-ca is for backends, which x:app replaces"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_setting_is_one_line(what: str, authority: Authority, certificate: CertificateFiles) -> None:
    flags, line = WRONG[what]
    files = {"ca": authority.path, "key": certificate[1]}
    given = [each.format(**files) for each in flags]
    status, lines = run("--cert", certificate[0], "--key", certificate[1], *given, "--check")
    assert (status, len(lines)) == (2, 1), lines
    assert line.format(**files) in lines[0]


LONG = ".".join(["a" * 60] * 4)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("core.example", "DNS:core.example"),
        ("Core.Example.", "DNS:core.example"),
        ("a.core.example", "DNS:*.core.example"),
        ("my_core", "DNS:my_core"),
        ("münchen.example", "DNS:xn--mnchen-3ya.example"),
        (f"{LONG}.{'a' * 9}", f"DNS:{LONG}.{'a' * 9}"),
        ("192.0.2.1", "IP:192.0.2.1"),
        ("2001:db8:0::1", "IP:2001:db8::1"),
    ],
)
def test_a_name_that_a_certificate_has_is_accepted(authority: Authority, name: str, entry: str) -> None:
    credentials = Credentials(ClientSettings(str(authority.path)))
    verified = BackendTLS(credentials, name).name
    server = context(authority.issue("other", alternative=entry))
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = credentials.context.wrap_bio(to_client, to_server, server_hostname=verified)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for each in (ours, theirs):
        with contextlib.suppress(ssl.SSLWantReadError):
            each.do_handshake()
    ours.do_handshake()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "*.core.example",
            "a*.example",
            "a..example",
            ".example",
            "a b.example",
            "a\tb",
            "a\0b",
            "a/b",
            "a@b",
            "core.example:465",
        ),
        *("[2001:db8::1]", "fe80::1%lo", "127.1", "0x7f.1", "2130706433", "192.0.2.300", "192.0.2.1/32", "", "."),
        *("a" * 64, f"{LONG}.{'a' * 10}", f"{LONG}.{'a' * 12}", "\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 60, "\udcff.example"),
    ],
)
def test_a_name_that_no_certificate_can_have_is_an_error(authority: Authority, name: str) -> None:
    with pytest.raises(ValueError, match="is not a host name or an IP address"):
        BackendTLS(Credentials(ClientSettings(str(authority.path))), name)


def test_listeners_may_differ_in_their_tls_backends(
    tmp_path: Path, authority: Authority, make_certificate: MakeCertificate
) -> None:
    cert, key = make_certificate("localhost")
    table = '[[edge.listener]]\naddress = "127.0.0.1:{}"\nmode = "tls"\nbackend = "{}"\n{}\n'

    def check(*tables: tuple[str, str]) -> list[str]:
        path = tmp_path / "edge.toml"
        head = f'[edge]\ncert = "{cert}"\nkey = "{key}"\n'
        path.write_text(head + "".join(table.format(0, *each) for each in tables))
        return run("--config", path, "--check")[1]

    ca = f'backend-ca = "{authority.path}"'
    assert "backend-ca is for backends over TLS" in check(("127.0.0.1:1", ca))[0]
    same = "backend-ca, backend-name, backend-cert and backend-key must be the same"
    assert same in check(("tls:127.0.0.1:1", ca), ("tls:127.0.0.1:1", ""))[0]
    assert "Connection refused" in check(("tls:127.0.0.1:1", ca), ("127.0.0.1:1", ""))[0]
    assert "backend-key without" in check(("tls:127.0.0.1:1", f'backend-key = "{key}"'))[0]
    wildcard = 'backend-name = "*.example"'
    assert "edge.listener]] 127.0.0.1:0: --backend-name: '*.example' is not" in check(("tls:127.0.0.1:1", wildcard))[0]
