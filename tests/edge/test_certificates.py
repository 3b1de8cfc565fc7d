"""Certificates: what is read from them, which one a name gets, and what is said of files that will not do."""

from __future__ import annotations

import ssl
import subprocess
import time

import pytest

from fumi_edge.certificates import CertificateError, Certificates, Policy, load


def test_names_and_validity_are_read_from_the_certificate(make_certificate):
    cert, key = make_certificate("mail.example.org", "*.example.org", "192.0.2.1", options=("-days", "30"))
    entry = load(Policy(), str(cert), str(key))
    assert entry.names == ("mail.example.org", "*.example.org", "192.0.2.1")
    text = subprocess.check_output(["openssl", "x509", "-enddate", "-noout", "-in", cert], text=True)
    assert entry.not_after == ssl.cert_time_to_seconds(text.strip().removeprefix("notAfter="))
    assert entry.not_before <= time.time() <= entry.not_after


def test_a_certificate_outside_its_validity_is_loaded_and_reported(make_certificate, tmp_path):
    cert, key = make_certificate("old.example.org")
    entry = load(Policy(), str(cert), str(key))
    certificates = Certificates([(str(cert), str(key))])
    assert certificates.problem(entry.not_after) is None
    assert certificates.problem(entry.not_before - 1) == "no valid certificate: not yet valid"
    old = tmp_path / "old.pem"
    subprocess.run(["openssl", "x509", "-in", cert, "-signkey", key, "-days", "-1", "-out", old], check=True, capture_output=True)
    certificates = Certificates([(str(old), str(key))])
    assert certificates.entries[0].not_after < time.time()
    assert certificates.problem(time.time()) == "no valid certificate: expired"


def test_the_key_may_be_in_the_certificates_file(make_certificate, tmp_path):
    cert, key = make_certificate("localhost")
    both = tmp_path / "both.pem"
    both.write_text(cert.read_text() + key.read_text())
    assert load(Policy(), str(both)).names == ("localhost",)


def test_a_name_gets_the_exact_certificate_then_the_wildcard_then_the_first(make_certificate):
    pairs = [make_certificate(name) for name in ("first.test", "*.example.org", "mail.example.org")]
    certificates = Certificates([(str(cert), str(key)) for cert, key in pairs])
    first, wildcard, exact = (entry.context for entry in certificates.entries)
    assert certificates.context_for("mail.example.org") is exact
    assert certificates.context_for("MAIL.Example.Org.") is exact
    assert certificates.context_for("other.example.org") is wildcard
    for name in ("a.b.example.org", "example.org", "first.test", "nobody.test", "", None):
        assert certificates.context_for(name) is first


@pytest.mark.parametrize("case", ["missing", "no certificate", "no key", "other key", "encrypted", "no key file", "nonsense"])
def test_what_cannot_be_used_is_one_line_that_names_the_file(make_certificate, tmp_path, case):
    cert, key = make_certificate("localhost")
    other = make_certificate("other.test")[1]
    encrypted, nonsense = tmp_path / "encrypted.pem", tmp_path / "nonsense.pem"
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", encrypted], check=True)
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n")
    arguments, complaint = {
        "missing": ((tmp_path / "none.pem", key), "cannot read the certificate: No such file"),
        "no certificate": ((key, key), "holds no PEM certificate"),
        "no key": ((cert, None), "holds no private key; name its file with --key"),
        "other key": ((cert, other), "does not belong to the certificate"),
        "encrypted": ((cert, encrypted), "is encrypted"),
        "no key file": ((cert, tmp_path / "none.pem"), "cannot read the key: No such file"),
        "nonsense": ((nonsense, key), "OpenSSL cannot read the certificate"),
    }[case]
    with pytest.raises(CertificateError, match=complaint) as caught:
        load(Policy(), *(each and str(each) for each in arguments))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("/")


def test_a_key_that_may_not_be_read_is_said_so(make_certificate, monkeypatch):
    cert, key = make_certificate("localhost")
    real = open

    def refuse(path, *arguments, **options):
        if path == str(key):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CertificateError, match=r"key\.pem: cannot read the key: Permission denied"):
        load(Policy(), str(cert), str(key))
