"""Directories of certificates: which files are used, which are skipped, and what the log says of those."""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path

import pytest

from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import CertificateError
from tests.support.certificates import Authority


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """What ops/certs/dev-ca leaves: an authority with its key beside it, and a certificate with its key in it."""
    dev_ca = Path(__file__).parents[2] / "ops" / "certs" / "dev-ca"
    subprocess.run([dev_ca, tmp_path / "dev", "server", "mail.example.org"], check=True, capture_output=True)
    return tmp_path / "dev"


def test_a_ca_certificate_in_a_directory_is_skipped_and_logged(dev: Path, authority: Authority) -> None:
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


def test_files_of_a_directory_without_a_certificate_are_skipped_and_logged(authority: Authority, tmp_path: Path) -> None:
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
def test_a_certificate_that_is_bad_is_an_error_in_a_directory_too(authority: Authority, tmp_path: Path, bad: str) -> None:
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


def test_a_file_that_loses_its_certificate_keeps_it_in_service(authority: Authority, tmp_path: Path) -> None:
    for name in ("a", "b"):
        cert, key = authority.issue(f"{name}.test")
        (tmp_path / f"{name}.pem").write_text(cert.read_text() + key.read_text())
    certificates = Certificates([(tmp_path, None)])
    (tmp_path / "b.pem").write_text("")  # as it is for a moment while it is replaced
    reading = certificates.read()
    assert (reading.complaints, reading.skipped) == ([f"{tmp_path}/b.pem: holds no PEM certificate"], [])
    certificates.install(reading)
    assert [entry.name for entry in certificates.entries] == ["a.test", "b.test"]


def test_an_authority_alone_or_by_its_name_is_an_error(dev: Path) -> None:
    with pytest.raises(CertificateError, match=r"ca.pem: not usable by a TLS server"):
        Certificates([(dev / "ca.pem", dev / "ca.key")])
    (dev / "mail.example.org.pem").unlink()
    with pytest.raises(CertificateError, match=r"ca.pem: not usable by a TLS server"):
        Certificates([(dev, None)])
