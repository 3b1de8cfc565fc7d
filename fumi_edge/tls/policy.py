"""What the edge negotiates and what it asks of clients: a Policy makes SSL contexts, all alike but for their certificates.

TLS 1.2 and newer, forward secrecy and authenticated encryption only, the server's order of ciphers, neither renegotiation nor
compression (RFC 9325). With a client CA, clients are asked for a certificate (RFC 8446 §4.3.2). One that does not verify ends
the handshake with an alert, "optional" or not: OpenSSL lets only a callback decide otherwise, and Python has none. Nor can
Python send the names of the authorities in that request, so a client with several certificates has to know which one to show.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from fumi_edge.tls.pem import CertificateError, Source, authorities, label

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; TLS 1.3 has only such ciphers."""
IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
_NEVER = ":!aNULL:!eNULL"


class TLSSocket(ssl.SSLSocket):
    """A TLS socket that knows which name its client asked for."""

    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What all listeners negotiate: ``min_tls`` is "1.2" or "1.3", ``alpn`` the protocols they take, best first.

    ``ciphers`` is an OpenSSL cipher list for TLS 1.2. ``client_ca`` are the authorities of client certificates, if clients are
    to be asked for one; ``client_cert`` is "optional" or "required" then. Raises ValueError for a cipher list without a cipher.
    """

    min_tls: str = "1.2"
    alpn: tuple[str, ...] = ()
    ciphers: str = CIPHERS
    client_ca: Source | None = None
    client_cert: str = "optional"

    def __post_init__(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(self.ciphers + _NEVER)
        except ssl.SSLError:
            raise ValueError(f"{self.ciphers!r} selects no TLS 1.2 cipher: see openssl ciphers -v -tls1_2 -s") from None

    def read_client_ca(self) -> str | None:
        """The authorities as PEM, read now and found usable; None when clients are not asked. Raises CertificateError."""
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
        """A new context without a certificate, for what ``read_client_ca`` gave."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if self.min_tls == "1.3" else ssl.TLSVersion.TLSv1_2
        context.set_ciphers(self.ciphers + _NEVER)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
        # Without it OpenSSL 3 kills both directions when a client that half-closes forgets close_notify.
        context.options |= IGNORE_UNEXPECTED_EOF
        # Clients resume with the newest ticket; the second one that OpenSSL sends by default is only work. Where clients are
        # asked for a certificate they get none: each resumption would come with a new ticket, for as long as the client likes,
        # whether or not its certificate is still valid. TLS 1.2 gives a ticket at a full handshake only, for two hours.
        context.num_tickets = 0 if self.client_ca else 1
        context.sslsocket_class = TLSSocket
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED if self.client_cert == "required" else ssl.CERT_OPTIONAL
        if client_ca is not None:
            context.load_verify_locations(cadata=client_ca)
        return context
