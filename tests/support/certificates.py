"""Certificates made by the openssl program: self-signed ones, and those of an authority."""

from __future__ import annotations

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

CertificateFiles = tuple[Path, Path]
"""A certificate and its key."""


class MakeCertificate(Protocol):
    """The fixture ``make_certificate``."""

    def __call__(self, *names: str, options: tuple[str, ...] = ...) -> CertificateFiles: ...


class MakeAuthority(Protocol):
    """The fixture ``make_authority``."""

    def __call__(self, name: str = ...) -> Authority: ...


def self_signed(directory: Path, *names: str, options: tuple[str, ...] = ("-days", "2")) -> CertificateFiles:
    """A self-signed certificate for the names and addresses, the first one its CN: the paths of cert.pem and key.pem."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    alternatives = ",".join(f"IP:{name}" if name[0].isdigit() else f"DNS:{name}" for name in names)
    subject = ("-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={alternatives}")
    openssl("req", "-x509", "-nodes", *new_key("ec"), "-keyout", key, "-out", cert, *subject, *options)
    return cert, key


def serial(cert: Path) -> str:
    """The serial number of a certificate file, in hexadecimal digits."""
    return openssl("x509", "-serial", "-noout", "-in", cert).strip().partition("=")[2]


def shown_serial(sock: ssl.SSLSocket | ssl.SSLObject) -> str:
    """The serial number of the certificate that the other side showed, in hexadecimal digits."""
    shown = sock.getpeercert()
    assert shown
    return str(shown["serialNumber"])


def shown_pem(sock: ssl.SSLSocket | ssl.SSLObject) -> str:
    """The certificate that the other side showed, as PEM."""
    shown = sock.getpeercert(binary_form=True)
    assert shown
    return ssl.DER_cert_to_PEM_cert(shown)


def new_key(kind: str) -> tuple[str, ...]:
    """The words that have openssl req make a new key, ``ec`` or ``rsa``."""
    return ("-newkey", "rsa:2048") if kind == "rsa" else ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")


def openssl(*words: str | Path) -> str:
    """What the openssl program prints. Raises CalledProcessError."""
    return subprocess.run(["openssl", *words], check=True, capture_output=True, text=True).stdout


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
        openssl("req", "-x509", "-nodes", *new_key("ec"), *usage, *made)

    def issue(
        self,
        *names: str,
        kind: str = "ec",
        days: float = 2,
        alternative: str = "",
        is_ca: bool = False,
        usage: str = "",
        begins: float = 0,
    ) -> CertificateFiles:
        """A certificate for the names, the first one its CN, with an "ec" or an "rsa" key; the paths of both, new each time.

        ``usage`` is its extended key usage, and ``begins`` the number of days after which it becomes valid.
        """
        self._number += 1
        cert, key = (self._directory / f"{self._number}.{end}" for end in ("pem", "key"))
        request, extensions, settings = (self._directory / name for name in ("request", "extensions", "settings"))
        openssl("req", "-utf8", "-nodes", *new_key(kind), "-keyout", key, "-out", request, "-subj", f"/CN={names[0]}")
        alternative = alternative or ",".join(f"DNS:{name}" for name in names)
        extensions.write_text(f"authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\nsubjectAltName={alternative}\n")
        if is_ca:
            extensions.write_text("basicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=hash\n")
        if usage:
            extensions.write_text(f"{extensions.read_text()}extendedKeyUsage={usage}\n")
        settings.write_text(SETTINGS.format(directory=self._directory))
        (self._directory / "serial").write_text(f"{1000 + self._number:04X}")
        (self._directory / "index").touch()
        now = datetime.now(UTC)
        begin, end = (
            f"{moment:%Y%m%d%H%M%SZ}" for moment in (now - timedelta(days=9 if days < 0 else -begins), now + timedelta(days))
        )
        # Not x509, which takes a number of days only, and in newer versions none that lie in the past.
        ca = ("-batch", "-notext", "-config", settings, "-cert", self.path, "-keyfile", self._key, "-extfile", extensions)
        openssl("ca", *ca, "-startdate", begin, "-enddate", end, "-in", request, "-out", cert)
        return cert, key
