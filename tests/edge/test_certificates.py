"""Certificates: what is read from them, which one a name gets, and what is said of files that will not do."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import CertificateError, Pair, authorities, load
from fumi_edge.tls.policy import Policy


def shake_hands(certificates, name, client_context, session=None):
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


@pytest.fixture
def served(authority):
    """Which certificate, by its number, somebody is shown who asks for a name."""
    context = ssl.create_default_context(cafile=authority.path)
    context.check_hostname = False

    def ask(certificates, name):
        return shake_hands(certificates, name, context).getpeercert()["serialNumber"]

    return ask


def serial(cert):
    return subprocess.check_output(["openssl", "x509", "-serial", "-noout", "-in", cert], text=True).strip().partition("=")[2]


def test_names_and_validity_are_read_from_the_certificate(make_certificate):
    cert, key = make_certificate("mail.example.org", "*.example.org", "192.0.2.1", options=("-days", "30"))
    entry = load(Pair(cert, key))
    assert entry.names == ("mail.example.org", "*.example.org", "192.0.2.1")
    text = subprocess.check_output(["openssl", "x509", "-enddate", "-noout", "-in", cert], text=True)
    assert entry.not_after == ssl.cert_time_to_seconds(text.strip().removeprefix("notAfter="))
    assert entry.not_before <= time.time() <= entry.not_after
    assert entry.kind == "ECDSA"


def test_a_certificate_outside_its_validity_is_loaded_and_reported(make_certificate, authority):
    cert, key = make_certificate("old.example.org")
    certificates = Certificates([(cert, key)])
    (entry,) = certificates.entries
    assert certificates.local_problem(entry.not_after) is None
    assert "is not valid before 20" in certificates.local_problem(entry.not_before - 1)
    expired = authority.issue("expired.test", days=-1)
    both = Certificates([expired, (cert, key)])
    assert both.local_problem(time.time()) is None
    (problem,) = both.validity_problems(time.time())
    assert problem.startswith(f"{expired[0]}: the certificate expired on 20")
    assert Certificates([expired]).local_problem(time.time()) == f"no valid certificate: {problem}"


@pytest.mark.parametrize("key_first", [False, True])
def test_the_key_may_be_in_the_certificates_file(make_certificate, tmp_path, key_first):
    texts = [path.read_text() for path in make_certificate("localhost")]
    both = tmp_path / "both.pem"
    both.write_text("".join(reversed(texts) if key_first else texts))
    assert load(Pair(both)).names == ("localhost",)


def test_certificate_and_key_may_be_given_as_text(make_certificate):
    cert, key = make_certificate("localhost")
    assert load(Pair(cert.read_text(), key.read_bytes())).names == ("localhost",)
    with pytest.raises(CertificateError, match=r"^\(PEM text\): holds no private key"):
        load(Pair(cert.read_text()))


def test_a_name_gets_the_exact_certificate_then_the_wildcard_then_the_first(authority, served):
    pairs = [authority.issue(name) for name in ("first.test", "*.example.org", "mail.example.org")]
    certificates = Certificates(pairs)
    first, wildcard, exact = (serial(cert) for cert, _ in pairs)
    assert served(certificates, "mail.example.org") == exact
    assert served(certificates, "MAIL.Example.Org") == exact
    assert served(certificates, "other.example.org") == wildcard
    for name in ("a.b.example.org", "example.org", "first.test", "nobody.test", None):
        assert served(certificates, name) == first


def test_an_rsa_and_an_ecdsa_certificate_for_one_name_are_both_served(backend, edge, authority, kit):
    """Clients that can verify only one kind get that one; names with one certificate are not offered another's."""
    ecdsa, rsa = authority.issue("both.test", "ecdsa.test"), authority.issue("both.test", "rsa.test", kind="rsa")
    program = edge(backend=backend(), certs=("--cert", ecdsa[0], "--key", ecdsa[1], "--cert", rsa[0], "--key", rsa[1]))
    trust = ("-CAfile", authority.path)

    def served(name, *flags):
        return kit.s_client(program.tls_port, *trust, "-servername", name, *flags)

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
def test_of_certificates_for_one_name_the_valid_one_that_expires_last_is_served(authority, served, lifetimes, best):
    pairs = [authority.issue("one.test", days=days) for days in lifetimes]
    certificates = Certificates(pairs)
    for name in ("one.test", None):
        assert served(certificates, name) == serial(pairs[best][0])
    assert [entry.pair.cert for entry in certificates.served] == [pairs[best][0]]
    assert certificates.validity_problems(time.time()) == []
    assert certificates.local_problem(time.time()) is None


def test_where_none_is_valid_the_one_that_expired_last_is_served_and_nothing_is_ready(make_certificate, served):
    pairs = [make_certificate("one.test", options=("-days", days)) for days in ("3", "4", "2")]
    certificates = Certificates(pairs)
    last = max(entry.not_after for entry in certificates.entries)
    certificates.install(certificates.choose(last + 1))
    assert [entry.pair.cert for entry in certificates.served] == [pairs[1][0]]
    assert certificates.local_problem(last + 1).startswith(f"no valid certificate: {pairs[1][0]}: the certificate expired on")


def test_a_certificate_that_expires_or_becomes_valid_changes_the_choice(authority, served):
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


def test_an_expired_kind_is_not_served_beside_a_valid_one(authority, served):
    """A client that prefers ECDSA would otherwise get the expired certificate."""
    ecdsa, rsa = authority.issue("both.test", days=HOUR), authority.issue("both.test", kind="rsa", days=DAY)
    certificates = Certificates([ecdsa, rsa])
    assert served(certificates, "both.test") == serial(ecdsa[0])
    certificates.install(certificates.choose(certificates.selection.until + 1))
    for name in ("both.test", None):
        assert served(certificates, name) == serial(rsa[0])
    assert [entry.kind for entry in certificates.served] == ["RSA"]


def test_a_valid_wildcard_goes_before_an_exact_certificate_that_has_expired(authority, served):
    exact, wildcard = authority.issue("mail.example.org", days=HOUR), authority.issue("*.example.org", days=DAY)
    certificates = Certificates([exact, wildcard])
    assert served(certificates, "mail.example.org") == serial(exact[0])
    certificates.install(certificates.choose(certificates.selection.until + 1))
    for name in ("mail.example.org", "MAIL.EXAMPLE.ORG.", "other.example.org", None):
        assert served(certificates, name) == serial(wildcard[0])


def test_a_renewal_makes_only_the_contexts_that_have_changed(authority):
    pairs = [authority.issue(f"{name}.test") for name in "ab"]
    certificates = Certificates(pairs)
    before = [certificates.selection.context_for(f"{name}.test") for name in "ab"]
    pairs[0][0].write_bytes((new := authority.issue("a.test"))[0].read_bytes())
    pairs[0][1].write_bytes(new[1].read_bytes())
    certificates.install(certificates.read())
    after = [certificates.selection.context_for(f"{name}.test") for name in "ab"]
    assert [one is other for one, other in zip(before, after, strict=True)] == [False, True]


def test_without_a_server_name_both_kinds_of_port_show_the_first(backend, edge, authority, kit):
    first, second = authority.issue("first.test"), authority.issue("second.test")
    program = edge(backend=backend(), certs=("--cert", first[0], "--key", first[1], "--cert", second[0], "--key", second[1]))
    for port, starttls in ((program.tls_port, False), (program.starttls_port, True)):
        for name, shown in (("-noservername", "first.test"), ("-servername=second.test", "second.test")):
            printed = kit.s_client(port, *name.split("="), starttls=starttls)
            assert re.search(f"^subject=CN ?= ?{re.escape(shown)}$", printed, re.MULTILINE)


def test_a_new_certificate_given_as_text_replaces_all_or_nothing(authority, served):
    old, new = authority.issue("localhost"), authority.issue("localhost", kind="rsa")
    certificates = Certificates([old])
    with pytest.raises(CertificateError, match="does not belong"):
        certificates.update(new[0].read_bytes(), old[1].read_bytes())
    assert served(certificates, "localhost") == serial(old[0])
    certificates.update(new[0].read_text(), new[1])
    assert served(certificates, "localhost") == serial(new[0])
    assert [entry.kind for entry in certificates.entries] == ["RSA"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_outlives_the_certificate_and_its_kind_of_key(authority, version):
    old, new = authority.issue("localhost", kind="rsa"), authority.issue("localhost")
    certificates = Certificates([old])
    context = ssl.create_default_context(cafile=authority.path)
    context.minimum_version = context.maximum_version = version
    session = shake_hands(certificates, "localhost", context).session
    certificates.update(*new)
    assert shake_hands(certificates, "localhost", context, session).session_reused


@pytest.mark.parametrize(
    "case",
    ["missing", "directory", "no certificate", "no key", "other key", "encrypted", "no key file", "nonsense", "weak", "half"],
)
def test_what_cannot_be_used_is_one_line_that_names_the_file(make_certificate, tmp_path, case):
    cert, key = make_certificate("localhost")
    other = make_certificate("other.test")[1]
    encrypted, nonsense, weak, half = (tmp_path / f"{name}.pem" for name in ("encrypted", "nonsense", "weak", "half"))
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", encrypted], check=True)
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n")
    half.write_text(cert.read_text()[:300])
    if case == "weak":
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-nodes",
                "-newkey",
                "rsa:1024",
                "-subj",
                "/CN=weak",
                "-keyout",
                weak,
                "-out",
                tmp_path / "x",
            ],
            check=True,
            capture_output=True,
        )
        weak.write_text(weak.read_text() + (tmp_path / "x").read_text())
    arguments, complaint = {
        "missing": ((tmp_path / "none.pem", key), "cannot read the certificate: No such file"),
        "directory": ((tmp_path, key), "cannot read the certificate: Is a directory"),
        "no certificate": ((key, key), "holds no PEM certificate"),
        "no key": ((cert, None), "holds no private key; name its file with --key"),
        "other key": ((cert, other), "does not belong to the certificate"),
        "encrypted": ((cert, encrypted), "is encrypted"),
        "no key file": ((cert, tmp_path / "none.pem"), "cannot read the key: No such file"),
        "nonsense": ((nonsense, key), "OpenSSL cannot read the certificate"),
        "weak": ((weak, None), "not usable by a TLS server: ee key too small"),
        "half": ((half, key), "holds no PEM certificate"),
    }[case]
    with pytest.raises(CertificateError, match=complaint) as caught:
        load(Pair(*arguments))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("/")


def test_who_has_another_form_hears_how_to_convert_it(make_certificate, tmp_path):
    cert, key = make_certificate("localhost")
    made = {name: tmp_path / name for name in ("cert.der", "key.der", "both.p12", "new.pem")}

    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    openssl("x509", "-in", cert, "-outform", "DER", "-out", made["cert.der"])
    openssl("pkey", "-in", key, "-outform", "DER", "-out", made["key.der"])
    openssl("pkcs12", "-export", "-in", cert, "-inkey", key, "-passout", "pass:", "-out", made["both.p12"])
    new = made["new.pem"]
    for pair, converted in (
        (Pair(made["cert.der"], key), Pair(new, key)),
        (Pair(cert, made["key.der"]), Pair(cert, new)),
        (Pair(made["both.p12"]), Pair(new)),
    ):
        with pytest.raises(
            CertificateError, match=r"(der|p12): is (DER|PKCS#12) and not PEM; convert it with openssl "
        ) as caught:
            load(pair)
        old, _, command = str(caught.value).partition(": is ")
        words = command.partition("with openssl ")[2].split()
        password = ["-passin", "pass:"] if "pkcs12" in words else []
        openssl(*({"OLD": old, "NEW": new}.get(word, word) for word in words), *password)
        assert load(converted).names == ("localhost",)
    with pytest.raises(CertificateError, match=r"cert\.der: is DER and not PEM"):
        authorities(made["cert.der"])


def test_who_has_put_the_authority_first_hears_of_it(authority, make_certificate, tmp_path):
    cert, key = authority.issue("localhost")
    chain = tmp_path / "chain.pem"
    complaint = r"certificate in .*chain\.pem, whose first certificate is an authority's: the server's own must come first$"
    chain.write_text(authority.path.read_text() + cert.read_text())
    with pytest.raises(CertificateError, match=complaint):
        load(Pair(chain, key))
    alone, other = make_certificate("alone.test")[0], make_certificate("other.test")[1]  # which may sign, as it is its own
    with pytest.raises(CertificateError, match=r"does not belong to the certificate in .*cert\.pem$"):
        load(Pair(alone, other))


@pytest.mark.parametrize("second", ["AAAA", "é", "bm9uc2Vuc2U=", None])
def test_a_certificate_of_several_that_cannot_be_read_is_told_by_its_number(authority, tmp_path, second):
    cert, key = authority.issue("localhost")
    chain = tmp_path / "chain.pem"
    ended = "" if second is None else f"{second}\n-----END CERTIFICATE-----\n"
    chain.write_text(f"{cert.read_text()}-----BEGIN CERTIFICATE-----\n{ended}{authority.path.read_text()}")
    with pytest.raises(CertificateError) as caught:
        load(Pair(chain, key))
    assert str(caught.value) == f"{chain}: OpenSSL cannot read certificate 2 of the 3 in the file"


STRANGE = """
import itertools
from fumi_edge.tls.pem import CertificateError, Pair, authorities, is_authority, load

begin, end, room = b"-----BEGIN CERTIFICATE-----\\n", b"-----END CERTIFICATE-----\\n", 4 << 20
many = begin * (room // len(begin) - 9)
for data in (many, many + end, begin + end + many, bytes(room), b"-" * room, b"-----BEGIN " * (room // 11), b"\\x30" * room):
    for act in (lambda: load(Pair(data)), lambda: authorities(data), lambda: is_authority(data)):
        try:
            act()
        except CertificateError as error:
            print(len(str(error)) < 200)
"""


def test_a_strange_file_takes_no_longer_than_its_length(tmp_path):
    """In a process of its own, to be ended: to look at every beginning for every end would take hours."""
    done = subprocess.run([sys.executable, "-c", STRANGE], capture_output=True, text=True, timeout=120, check=True)
    assert set(done.stdout.split()) == {"True"}


def test_a_file_that_is_too_large_is_not_read(make_certificate, tmp_path):
    large = tmp_path / "large.pem"
    large.touch()
    os.truncate(large, 1 << 40)
    cert, key = make_certificate("localhost")
    for pair in (Pair(large), Pair(cert, large)):
        with pytest.raises(CertificateError, match=r"large\.pem: cannot read the (certificate|key): it has more than 4 MiB"):
            load(pair)
    both = tmp_path / "certs" / "both.pem"
    both.parent.mkdir()
    both.write_text(cert.read_text() + key.read_text())
    certificates = Certificates([(both.parent, None)], Policy(client_ca=cert))
    large.rename(both.parent / "large.pem")
    assert certificates.read().complaints == [f"{both.parent}/large.pem: cannot read the certificate: it has more than 4 MiB"]


def test_blocks_on_one_line_are_named_as_that(authority, make_certificate, tmp_path):
    """As cat joins files of which one has no line break at its end; OpenSSL would blame the key."""
    cert, key = authority.issue("localhost")
    stripped = cert.read_text().rstrip("\n")
    number = stripped.count("\n") + 1
    complaint = rf"glued\.pem: line {number} has -----BEGIN after -----END; put a line break between them$"
    glued = tmp_path / "glued.pem"
    for text, pair in (
        (stripped + authority.path.read_text(), Pair(glued, key)),
        (stripped + key.read_text(), Pair(glued)),
        (stripped + key.read_text(), Pair(cert, glued)),
    ):
        glued.write_text(text)
        with pytest.raises(CertificateError, match=complaint):
            load(pair)
    with pytest.raises(CertificateError, match=complaint):
        authorities(glued)


def test_a_byte_order_mark_is_no_part_of_a_file(make_certificate, tmp_path):
    pair = []
    for path in make_certificate("localhost"):
        pair.append(tmp_path / path.name)
        pair[-1].write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(Pair(*pair)).names == ("localhost",)
    assert "\ufeff" not in authorities(pair[0])


def test_loading_leaves_no_descriptor_open(make_certificate):
    cert, key = make_certificate("localhost")
    load(Pair(cert, key))
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        load(Pair(cert, key))
    # Fewer, when a thread of an earlier test or the garbage collector has closed one of theirs.
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_a_key_that_may_not_be_read_is_said_so(make_certificate, monkeypatch):
    cert, key = make_certificate("localhost")
    real = os.open

    def refuse(path, *arguments, **options):
        if path == key:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CertificateError, match=r"key\.pem: cannot read the key: Permission denied"):
        load(Pair(cert, key))


@pytest.fixture
def dev(tmp_path):
    """What ops/certs/dev-ca leaves: an authority with its key beside it, and a certificate with its key in it."""
    dev_ca = Path(__file__).parents[2] / "ops" / "certs" / "dev-ca"
    subprocess.run([dev_ca, tmp_path / "dev", "server", "mail.example.org"], check=True, capture_output=True)
    return tmp_path / "dev"


def test_an_authority_in_a_directory_is_left_alone_and_said_to_be(dev, authority):
    for key in (dev / "ca.key", None):
        certificates = Certificates([(dev, None)])
        assert [entry.name for entry in certificates.entries] == ["mail.example.org"]
        (skipped,) = certificates.skipped
        assert skipped.startswith(f"{dev}/ca.pem: {'not usable by a TLS server' if key else 'holds no private key'}")
        (dev / "ca.key").unlink(missing_ok=True)
    cert, _ = authority.issue("lonely.test")
    (dev / "lonely.pem").write_bytes(cert.read_bytes())
    with pytest.raises(CertificateError, match=r"lonely.pem: holds no private key"):
        Certificates([(dev, None)])  # no authority: somebody has forgotten its key


def test_what_holds_no_certificate_is_left_alone_in_a_directory_and_said_to_be(authority, tmp_path):
    cert, key = authority.issue("localhost")
    both = tmp_path / "localhost.pem"
    both.write_text(cert.read_text() + key.read_text())
    others = {
        "dhparam": "-----BEGIN DH PARAMETERS-----\nAAAA\n-----END DH PARAMETERS-----\n",
        "empty": "",
        "x-key": key.read_text(),
    }
    for name, text in others.items():
        (tmp_path / f"{name}.pem").write_text(text)
    (tmp_path / "sub.pem").mkdir()
    os.mkfifo(tmp_path / "fifo.pem")
    certificates = Certificates([(tmp_path, None)])
    assert [entry.name for entry in certificates.entries] == ["localhost"]
    assert sorted(certificates.skipped) == [
        f"{tmp_path}/dhparam.pem: holds no PEM certificate",
        f"{tmp_path}/empty.pem: holds no PEM certificate",
        f"{tmp_path}/fifo.pem: cannot read the certificate: it is not a regular file",
        f"{tmp_path}/sub.pem: cannot read the certificate: Is a directory",
        f"{tmp_path}/x-key.pem: holds no PEM certificate",
    ]
    both.unlink()
    with pytest.raises(CertificateError, match=r"dhparam.pem: holds no PEM certificate"):
        Certificates([(tmp_path, None)])  # nothing is left
    with pytest.raises(CertificateError, match=r"empty.pem: holds no PEM certificate"):
        Certificates([(tmp_path / "empty.pem", None)])


@pytest.mark.parametrize("bad", ["half", "broken", "trusted", "der", "keyless"])
def test_a_certificate_that_is_bad_is_an_error_in_a_directory_too(authority, tmp_path, bad):
    (cert, key), (other, _) = authority.issue("localhost"), authority.issue("other.test")
    (tmp_path / "localhost.pem").write_text(cert.read_text() + key.read_text())
    text = other.read_text()
    (tmp_path / "other.pem").write_bytes(
        {
            "half": text[:300].encode(),
            "broken": f"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n{key.read_text()}".encode(),
            "trusted": text.replace(" CERTIFICATE", " TRUSTED CERTIFICATE").encode(),
            "der": ssl.PEM_cert_to_DER_cert(text),
            "keyless": text.encode(),
        }[bad]
    )
    with pytest.raises(CertificateError, match=r"other\.pem: "):
        Certificates([(tmp_path, None)])


def test_a_renewal_may_come_in_a_file_of_another_name(authority, served, tmp_path):
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


def test_a_file_that_loses_its_certificate_keeps_it_in_service(authority, tmp_path):
    for name in ("a", "b"):
        cert, key = authority.issue(f"{name}.test")
        (tmp_path / f"{name}.pem").write_text(cert.read_text() + key.read_text())
    certificates = Certificates([(tmp_path, None)])
    (tmp_path / "b.pem").write_text("")  # as it is for a moment while it is written anew
    reading = certificates.read()
    assert (reading.complaints, reading.skipped) == ([f"{tmp_path}/b.pem: holds no PEM certificate"], [])
    certificates.install(reading)
    assert [entry.name for entry in certificates.entries] == ["a.test", "b.test"]


def test_an_authority_alone_or_by_its_name_is_an_error(dev):
    with pytest.raises(CertificateError, match=r"ca.pem: not usable by a TLS server"):
        Certificates([(dev / "ca.pem", dev / "ca.key")])
    (dev / "mail.example.org.pem").unlink()
    with pytest.raises(CertificateError, match=r"ca.pem: not usable by a TLS server"):
        Certificates([(dev, None)])


def test_ciphers_that_no_certificate_can_use_are_found(authority):
    ecdsa, rsa = authority.issue("a.test"), authority.issue("a.test", kind="rsa")
    only_rsa = Policy(ciphers="ECDHE-RSA-AES128-GCM-SHA256")
    assert Certificates([ecdsa], only_rsa).startup_problem() == (
        "--ciphers ECDHE-RSA-AES128-GCM-SHA256: none is for a certificate with ECDSA, so TLS 1.2 cannot be spoken"
    )
    assert Certificates([ecdsa, rsa], only_rsa).startup_problem() is None
    assert Certificates([ecdsa], Policy("1.3", ciphers=only_rsa.ciphers)).startup_problem() is None
    assert Certificates([rsa], Policy(ciphers="ECDHE-ECDSA-AES128-GCM-SHA256")).startup_problem() is not None
    assert [Certificates([each]).startup_problem() for each in (ecdsa, rsa)] == [None, None]
