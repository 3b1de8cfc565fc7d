"""What the edge negotiates and requests from clients: a Policy makes SSL contexts that differ only in their certificates.

TLS 1.2 and newer, forward secrecy and authenticated encryption only, the server's order of ciphers, neither renegotiation nor
compression (RFC 9325). With a client CA, client certificates are requested (RFC 8446 §4.3.2). A certificate that does not
verify ends the handshake with an alert, even if it is optional: only a callback of OpenSSL could accept it, and Python does not
offer that callback. Nor can Python send the names of the CAs in the request, so a client with several certificates must itself
know which one to send.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import NamedTuple

from fumi_edge.tls.pem import CertificateError, Pair, Source, authorities, label
from fumi_edge.tls.read_watch import WatchedSocket

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; all TLS 1.3 ciphers have forward secrecy and authenticated encryption."""
IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
EXCLUDED_CIPHERS = ":!aNULL:!eNULL"


def protocols(text: str) -> tuple[str, ...]:
    """The names of application protocols (ALPN, RFC 7301), given separated by commas. Raises ValueError."""
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if not all(name.isascii() and 0 < len(name) < 256 for name in names):
        raise ValueError("the name of a protocol must have 1 to 255 ASCII characters")
    return names


class TLSSocket(WatchedSocket):
    """A client's TLS socket with the name that its client requested (SNI)."""

    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What a listener negotiates: ``min_tls`` is "1.2" or "1.3", ``alpn`` the accepted protocols, best first.

    ``ciphers`` is an OpenSSL cipher list for TLS 1.2. ``client_ca`` holds the CAs of client certificates, None to request no
    certificates; ``client_cert`` is "optional" or "required". Raises ValueError for a cipher list that selects no cipher.
    """

    min_tls: str = "1.2"
    alpn: tuple[str, ...] = ()
    ciphers: str = CIPHERS
    client_ca: Source | None = None
    client_cert: str = "optional"

    def __post_init__(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(self.ciphers + EXCLUDED_CIPHERS)
        except ssl.SSLError:
            raise ValueError(f"{self.ciphers!r} selects no TLS 1.2 cipher: see openssl ciphers -v -tls1_2 -s") from None

    def read_client_ca(self) -> str | None:
        """Read and check the client CAs; returns PEM, or None without ``client_ca``. Raises CertificateError."""
        if self.client_ca is None:
            return None
        found = authorities(self.client_ca)
        try:
            self.context(found)
        except ssl.SSLError as error:
            raise CertificateError(
                f"{label(self.client_ca)}: OpenSSL cannot read a client CA certificate: {error.reason}"
            ) from None
        return found

    def context(self, client_ca: str | None = None) -> ssl.SSLContext:
        """Return a new context without a certificate. ``client_ca`` is the result of ``read_client_ca``."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if self.min_tls == "1.3" else ssl.TLSVersion.TLSv1_2
        context.set_ciphers(self.ciphers + EXCLUDED_CIPHERS)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
        # Without it OpenSSL 3 ends both directions when a client half-closes without close_notify.
        context.options |= IGNORE_UNEXPECTED_EOF
        # Clients resume with the newest ticket; the second one that OpenSSL sends by default is useless. Clients that are asked
        # for a certificate get none in TLS 1.3: each resumption would bring a new ticket, so a client could resume forever, even
        # after its certificate has expired. TLS 1.2 sends a ticket only in a full handshake, and it is valid for two hours.
        context.num_tickets = 0 if self.client_ca else 1
        context.sslsocket_class = TLSSocket
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED if self.client_cert == "required" else ssl.CERT_OPTIONAL
        if client_ca is not None:
            context.load_verify_locations(cadata=client_ca)
        return context


class CertificateSettings(NamedTuple):
    """The arguments of a Certificates: the sources, and the policy under which they are served."""

    sources: tuple[Pair, ...]
    policy: Policy = Policy()
