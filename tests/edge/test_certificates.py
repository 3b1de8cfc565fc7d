"""Certificates: what is read from them, and which one a name gets."""

from __future__ import annotations

import re
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import CertificateError, Pair, load
from fumi_edge.tls.policy import Policy
from tests.edge.backends import StartBackend
from tests.edge.clients import s_client
from tests.edge.program import StartEdge
from tests.support.certificates import Authority, MakeCertificate, serial, shown_serial


def shake_hands(
    certificates: Certificates, name: str | None, client_context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> ssl.SSLObject:
    """A handshake in memory with what a connection is given; the client's side."""
    front = certificates._front
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = front.wrap_bio(up, down, server_side=True)
    client = client_context.wrap_bio(down, up, server_hostname=name, session=session)
    for side in (client, server, client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    server.write(b"x")
    client.read(1)
    return client


Served = Callable[[Certificates, str | None], str]


@pytest.fixture
def served(authority: Authority) -> Served:
    """Which certificate, by its number, somebody is shown who asks for a name."""
    context = ssl.create_default_context(cafile=authority.path)
    context.check_hostname = False

    def ask(certificates: Certificates, name: str | None) -> str:
        return shown_serial(shake_hands(certificates, name, context))

    return ask


def test_names_and_validity_are_read_from_the_certificate(make_certificate: MakeCertificate) -> None:
    cert, key = make_certificate("mail.example.org", "*.example.org", "192.0.2.1", options=("-days", "30"))
    entry = load(Pair(cert, key))
    assert entry.names == ("mail.example.org", "*.example.org", "192.0.2.1")
    text = subprocess.check_output(["openssl", "x509", "-enddate", "-noout", "-in", cert], text=True)
    assert entry.not_after == ssl.cert_time_to_seconds(text.strip().removeprefix("notAfter="))
    assert entry.not_before <= time.time() <= entry.not_after
    assert entry.kind == "ECDSA"


def test_a_certificate_outside_its_validity_is_loaded_and_reported(
    make_certificate: MakeCertificate, authority: Authority
) -> None:
    cert, key = make_certificate("old.example.org")
    certificates = Certificates([(cert, key)])
    (entry,) = certificates.entries
    assert certificates.local_problem(entry.not_after) is None
    assert "is not valid before 20" in (certificates.local_problem(entry.not_before - 1) or "")
    expired = authority.issue("expired.test", days=-1)
    both = Certificates([expired, (cert, key)])
    assert both.local_problem(time.time()) is None
    (problem,) = both.validity_problems(time.time())
    assert problem.startswith(f"{expired[0]}: the certificate expired on 20")
    assert Certificates([expired]).local_problem(time.time()) == f"no valid certificate: {problem}"


def test_a_name_gets_the_exact_certificate_then_the_wildcard_then_the_first(authority: Authority, served: Served) -> None:
    pairs = [authority.issue(name) for name in ("first.test", "*.example.org", "mail.example.org")]
    certificates = Certificates(pairs)
    first, wildcard, exact = (serial(cert) for cert, _ in pairs)
    assert served(certificates, "mail.example.org") == exact
    assert served(certificates, "MAIL.Example.Org") == exact
    assert served(certificates, "other.example.org") == wildcard
    for name in ("a.b.example.org", "example.org", "first.test", "nobody.test", None):
        assert served(certificates, name) == first


def test_an_rsa_and_an_ecdsa_certificate_for_one_name_are_both_served(
    backend: StartBackend, edge: StartEdge, authority: Authority
) -> None:
    """Clients that can verify only one kind get that one; names with one certificate are not offered another's."""
    ecdsa, rsa = authority.issue("both.test", "ecdsa.test"), authority.issue("both.test", "rsa.test", kind="rsa")
    program = edge(backend=backend(), certs=("--cert", ecdsa[0], "--key", ecdsa[1], "--cert", rsa[0], "--key", rsa[1]))
    trust = ("-CAfile", authority.path)

    def served(name: str, *flags: str) -> str:
        return s_client(program.tls_port, *trust, "-servername", name, *flags)

    for name, algorithms, peer in (
        ("both.test", "RSA-PSS+SHA256", "RSA.PSS"),
        ("both.test", "ECDSA+SHA256", "ECDSA"),
        ("both.test", "RSA-PSS+SHA256:ECDSA+SHA256", "ECDSA"),
        ("unknown.test", "RSA-PSS+SHA256", "RSA.PSS"),
        ("unknown.test", "ECDSA+SHA256", "ECDSA"),
        ("rsa.test", "RSA-PSS+SHA256", "RSA.PSS"),
        ("ecdsa.test", "ECDSA+SHA256", "ECDSA"),
    ):
        for version in ("-tls1_2", "-tls1_3"):
            printed = served(name, "-sigalgs", algorithms, version)
            assert re.search(f"^Peer signature type: {peer}", printed, re.MULTILINE | re.IGNORECASE), (name, algorithms, printed)
            assert "Verify return code: 0" in printed
    assert "alert handshake failure" in served("rsa.test", "-sigalgs", "ECDSA+SHA256")
    assert "alert handshake failure" in served("ecdsa.test", "-sigalgs", "RSA-PSS+SHA256")


HOUR, DAY = 1 / 24, 1
EXPIRED = -1


@pytest.mark.parametrize(
    ("lifetimes", "best"),
    [((EXPIRED, DAY), 1), ((DAY, EXPIRED), 0), ((HOUR, DAY), 1), ((DAY, HOUR), 0), ((EXPIRED, HOUR, DAY), 2)],
)
def test_of_certificates_for_one_name_the_valid_one_that_expires_last_is_served(
    authority: Authority, served: Served, lifetimes: tuple[float, ...], best: int
) -> None:
    pairs = [authority.issue("one.test", days=days) for days in lifetimes]
    certificates = Certificates(pairs)
    for name in ("one.test", None):
        assert served(certificates, name) == serial(pairs[best][0])
    assert [entry.pair.cert for entry in certificates.served] == [pairs[best][0]]
    assert certificates.validity_problems(time.time()) == []
    assert certificates.local_problem(time.time()) is None


def test_where_none_is_valid_the_one_that_expired_last_is_served_and_nothing_is_ready(
    make_certificate: MakeCertificate, served: Served
) -> None:
    pairs = [make_certificate("one.test", options=("-days", days)) for days in ("3", "4", "2")]
    certificates = Certificates(pairs)
    last = max(entry.not_after for entry in certificates.entries)
    certificates.install(certificates.choose(last + 1))
    assert [entry.pair.cert for entry in certificates.served] == [pairs[1][0]]
    problem = certificates.local_problem(last + 1) or ""
    assert problem.startswith(f"no valid certificate: {pairs[1][0]}: the certificate expired on")


def test_a_certificate_that_expires_or_becomes_valid_changes_the_choice(authority: Authority, served: Served) -> None:
    short, long = authority.issue("one.test", days=HOUR), authority.issue("one.test", "two.test", days=DAY)
    certificates = Certificates([short, long, authority.issue("three.test", days=2)])
    soon = min(entry.not_after for entry in certificates.entries)
    assert certificates.selection.until == soon
    certificates.install(certificates.choose(soon))
    assert len(certificates.served) == 2
    late = Certificates([short])
    begin = late.entries[0].not_before
    before = late.choose(begin - 1).selection
    assert (before.until, late.choose(begin).selection.until) == (begin, soon)
    assert late.choose(soon + 1).selection.until == float("inf")


def test_an_expired_kind_is_not_served_beside_a_valid_one(authority: Authority, served: Served) -> None:
    """A client that prefers ECDSA would otherwise get the expired certificate."""
    ecdsa, rsa = authority.issue("both.test", days=HOUR), authority.issue("both.test", kind="rsa", days=DAY)
    certificates = Certificates([ecdsa, rsa])
    assert served(certificates, "both.test") == serial(ecdsa[0])
    certificates.install(certificates.choose(certificates.selection.until + 1))
    for name in ("both.test", None):
        assert served(certificates, name) == serial(rsa[0])
    assert [entry.kind for entry in certificates.served] == ["RSA"]


def test_a_valid_wildcard_goes_before_an_exact_certificate_that_has_expired(authority: Authority, served: Served) -> None:
    exact, wildcard = authority.issue("mail.example.org", days=HOUR), authority.issue("*.example.org", days=DAY)
    certificates = Certificates([exact, wildcard])
    assert served(certificates, "mail.example.org") == serial(exact[0])
    certificates.install(certificates.choose(certificates.selection.until + 1))
    for name in ("mail.example.org", "MAIL.EXAMPLE.ORG.", "other.example.org", None):
        assert served(certificates, name) == serial(wildcard[0])


def test_a_renewal_makes_only_the_contexts_that_have_changed(authority: Authority) -> None:
    pairs = [authority.issue(f"{name}.test") for name in "ab"]
    certificates = Certificates(pairs)
    before = [certificates.selection.context_for(f"{name}.test") for name in "ab"]
    pairs[0][0].write_bytes((new := authority.issue("a.test"))[0].read_bytes())
    pairs[0][1].write_bytes(new[1].read_bytes())
    certificates.install(certificates.read())
    after = [certificates.selection.context_for(f"{name}.test") for name in "ab"]
    assert [one is other for one, other in zip(before, after, strict=True)] == [False, True]


def test_without_a_server_name_both_kinds_of_port_show_the_first(
    backend: StartBackend, edge: StartEdge, authority: Authority
) -> None:
    first, second = authority.issue("first.test"), authority.issue("second.test")
    program = edge(backend=backend(), certs=("--cert", first[0], "--key", first[1], "--cert", second[0], "--key", second[1]))
    for port, starttls in ((program.tls_port, False), (program.starttls_port, True)):
        for name, shown in (("-noservername", "first.test"), ("-servername=second.test", "second.test")):
            printed = s_client(port, *name.split("="), starttls=starttls)
            assert re.search(f"^subject=CN ?= ?{re.escape(shown)}$", printed, re.MULTILINE)


def test_a_new_certificate_given_as_text_replaces_all_or_nothing(authority: Authority, served: Served) -> None:
    old, new = authority.issue("localhost"), authority.issue("localhost", kind="rsa")
    certificates = Certificates([old])
    with pytest.raises(CertificateError, match="does not belong"):
        certificates.update(new[0].read_bytes(), old[1].read_bytes())
    assert served(certificates, "localhost") == serial(old[0])
    certificates.update(new[0].read_text(), new[1])
    assert served(certificates, "localhost") == serial(new[0])
    assert [entry.kind for entry in certificates.entries] == ["RSA"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_outlives_the_certificate_and_its_kind_of_key(authority: Authority, version: ssl.TLSVersion) -> None:
    old, new = authority.issue("localhost", kind="rsa"), authority.issue("localhost")
    certificates = Certificates([old])
    context = ssl.create_default_context(cafile=authority.path)
    context.minimum_version = context.maximum_version = version
    session = shake_hands(certificates, "localhost", context).session
    certificates.update(*new)
    assert shake_hands(certificates, "localhost", context, session).session_reused


def test_a_renewal_may_come_in_a_file_of_another_name(authority: Authority, served: Served, tmp_path: Path) -> None:
    old, new, other = authority.issue("one.test"), authority.issue("one.test", days=9), authority.issue("two.test")
    for name, pair in (("1.pem", old), ("2.pem", other)):
        (tmp_path / name).write_text("".join(path.read_text() for path in pair))
    certificates = Certificates([(tmp_path, None)])
    (tmp_path / "3.pem").write_text("".join(path.read_text() for path in new))
    certificates.install(certificates.read())
    assert served(certificates, "one.test") == serial(new[0])
    (tmp_path / "1.pem").unlink()
    reading = certificates.read()
    assert reading.complaints == []
    certificates.install(reading)
    assert served(certificates, "one.test") == serial(new[0])
    assert len(certificates.entries) == 2


def test_ciphers_that_no_certificate_can_use_are_found(authority: Authority) -> None:
    ecdsa, rsa = authority.issue("a.test"), authority.issue("a.test", kind="rsa")
    only_rsa = Policy(ciphers="ECDHE-RSA-AES128-GCM-SHA256")
    assert Certificates([ecdsa], only_rsa).startup_problem() == (
        "--ciphers ECDHE-RSA-AES128-GCM-SHA256: no cipher works with a certificate for ECDSA, so no client can use TLS 1.2"
    )
    assert Certificates([ecdsa, rsa], only_rsa).startup_problem() is None
    assert Certificates([ecdsa], Policy("1.3", ciphers=only_rsa.ciphers)).startup_problem() is None
    assert Certificates([rsa], Policy(ciphers="ECDHE-ECDSA-AES128-GCM-SHA256")).startup_problem() is not None
    assert [Certificates([each]).startup_problem() for each in (ecdsa, rsa)] == [None, None]
