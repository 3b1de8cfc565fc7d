"""Certificate and key files → SSL contexts, one a certificate, chosen by SNI (RFC 6066 §3).

TLS 1.2 and newer, forward secrecy and authenticated encryption only, the server's order of ciphers, neither renegotiation nor
compression (RFC 9325). A context is built once: the session ticket keys belong to it.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; TLS 1.3 has only such ciphers."""
_IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, which ssl.VerifyFlags leaves out: an expired certificate still has facts to be read."""
_PEM_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_PEM_KEY = re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")
_PEM_ENCRYPTED = re.compile(r"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: 4,ENCRYPTED", re.MULTILINE)


class CertificateError(Exception):
    """A certificate or key that cannot be used; the message is one line and names the file."""


class TLSSocket(ssl.SSLSocket):
    """A TLS socket that knows which name its client asked for."""

    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What a listener negotiates: ``min_tls`` is "1.2" or "1.3", ``alpn`` the protocols it takes, best first."""

    min_tls: str = "1.2"
    alpn: tuple[str, ...] = ()

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if self.min_tls == "1.3" else ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
        # Without it OpenSSL 3 kills both directions when a client that half-closes forgets close_notify.
        context.options |= _IGNORE_UNEXPECTED_EOF
        # Clients resume with the newest ticket; the second one that OpenSSL sends by default is only work.
        context.num_tickets = 1
        context.sslsocket_class = TLSSocket
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        return context


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate in service: the file it came from, the names it is for, its validity in seconds since 1970."""

    path: str
    names: tuple[str, ...]
    not_before: float
    not_after: float
    context: ssl.SSLContext

    @property
    def name(self) -> str:
        return self.names[0] if self.names else os.path.basename(self.path)


def load(policy: Policy, cert: str, key: str | None = None) -> Certificate:
    """Read one PEM certificate chain with its key, from a second file or from the same. Raises CertificateError."""
    text = _read(cert, "certificate")
    leaf = _PEM_CERTIFICATE.search(text)
    if leaf is None:
        raise CertificateError(f"{cert}: holds no PEM certificate")
    key_text = text if key is None else _read(key, "key")
    if _PEM_ENCRYPTED.search(key_text):
        raise CertificateError(f"{key or cert}: the private key is encrypted; decrypt it with openssl pkey -in OLD -out NEW")
    if not _PEM_KEY.search(key_text):
        raise CertificateError(f"{key or cert}: holds no private key" + ("; name its file with --key" if key is None else ""))
    context = policy.context()
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
        facts = _facts(context, leaf[0])
    except ssl.SSLError as error:
        raise CertificateError(_complaint(error, cert, key)) from None
    return Certificate(cert, _names(facts), _seconds(facts["notBefore"]), _seconds(facts["notAfter"]), context)


def _read(path: str, what: str) -> str:
    try:
        with open(path, encoding="latin-1") as file:
            return file.read()
    except OSError as error:
        raise CertificateError(f"{path}: cannot read the {what}: {error.strerror}") from None


def _no_passphrase() -> str:
    # OpenSSL would otherwise ask on the terminal, which a daemon has not.
    raise CertificateError("the private key is encrypted")


def _complaint(error: ssl.SSLError, cert: str, key: str | None) -> str:
    reason = (error.reason or "").replace("_", " ").lower()
    if "mismatch" in reason:
        return f"{key or cert}: the private key does not belong to the certificate in {cert}"
    if "pem lib" in str(error).lower():
        return f"{cert}: OpenSSL cannot read the certificate, or the key in {key or cert}"
    verify = getattr(error, "verify_message", "")
    return f"{cert}: not usable by a TLS server: {verify or reason or error}"


def _seconds(asn1: object) -> float:
    return float(ssl.cert_time_to_seconds(str(asn1)))


def _facts(context: ssl.SSLContext, leaf: str) -> dict[str, object]:
    """What the certificate says, in getpeercert()'s form.

    Only a verified peer's certificate is decoded for us, so the new context shakes hands, in memory, with a client that trusts
    exactly this certificate. That also proves that key and certificate work.
    """
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.verify_flags = ssl.VerifyFlags(client_context.verify_flags | _NO_CHECK_TIME)
    client_context.load_verify_locations(cadata=leaf)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(up, down, server_side=True)
    client = client_context.wrap_bio(down, up)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return dict(client.getpeercert() or {})


def _names(facts: dict[str, object]) -> tuple[str, ...]:
    """The names a certificate is for: its subjectAltName entries or, in old ones, its common name (RFC 6125 §6.4.4)."""
    alternatives: Sequence[tuple[str, str]] = facts.get("subjectAltName", ())  # type: ignore[assignment]
    subject: Sequence[Sequence[tuple[str, str]]] = facts.get("subject", ())  # type: ignore[assignment]
    names = [value for kind, value in alternatives if kind in ("DNS", "IP Address")]
    names = names or [value for rdn in subject for kind, value in rdn if kind == "commonName"]
    return tuple(dict.fromkeys(name.lower() for name in names))


class Certificates:
    """All certificates of an edge; the first one answers clients whose name fits no other, or that send none."""

    def __init__(self, pairs: Sequence[tuple[str, str | None]], policy: Policy | None = None) -> None:
        """Load every (certificate, key) pair of paths. Raises CertificateError."""
        if not pairs:
            raise CertificateError("no certificate: name one with --cert")
        self.entries = [load(policy or Policy(), cert, key) for cert, key in pairs]
        self._by_name: dict[str, ssl.SSLContext] = {}
        for entry in self.entries:
            entry.context.sni_callback = self._on_server_name
            for name in entry.names:
                self._by_name.setdefault(name, entry.context)

    def context_for(self, name: str | None) -> ssl.SSLContext:
        """The context for a server name: the exact one, then the wildcard for its first label, then the first of all."""
        if name and len(self.entries) > 1:
            name = name.lower().rstrip(".")
            wildcard = "*." + name.partition(".")[2]
            found = self._by_name.get(name) or self._by_name.get(wildcard)
            if found is not None:
                return found
        return self.entries[0].context

    def _on_server_name(self, sock: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        sock.server_name = name  # type: ignore[attr-defined]
        chosen = self.context_for(name)
        if chosen is not context:
            sock.context = chosen

    def wrap(self, sock: socket.socket) -> TLSSocket:
        """The server's side of TLS on a connected non-blocking socket, which it takes over. Raises OSError when that is gone."""
        context = self.entries[0].context
        # Where OpenSSL takes a missing close_notify for an end, what Python calls a ragged end can only be a reset.
        wrapped = context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=not _IGNORE_UNEXPECTED_EOF
        )
        assert isinstance(wrapped, TLSSocket)
        return wrapped

    def ciphers(self) -> list[tuple[str, str]]:
        """(TLS version, cipher) for all that can be negotiated."""
        found = [(str(each["protocol"]), str(each["name"])) for each in self.entries[0].context.get_ciphers()]
        return [(version, name) for version, name in found if version in ("TLSv1.2", "TLSv1.3")]

    def problem(self, now: float) -> str | None:
        """Why no certificate is valid at ``now`` (seconds since 1970), or None when one is."""
        if any(entry.not_before <= now <= entry.not_after for entry in self.entries):
            return None
        return "no valid certificate: expired" if self.entries[0].not_after < now else "no valid certificate: not yet valid"
