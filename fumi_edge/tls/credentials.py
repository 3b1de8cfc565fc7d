"""The edge's CAs and certificate as a client of TLS backends, and their renewal.

TLS 1.2 and newer, forward secrecy and authenticated encryption only (RFC 9325). The server's certificate is always verified: its
chain, its validity, its purpose, and its name, which must be among the subjectAltName entries (RFC 9525 §6.3). Its common name
does not count. A stream that ends without close_notify is an error (RFC 8446 §6.1).
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fumi_edge.tls.pem import (
    Authority,
    Certificate,
    CertificateError,
    Pair,
    authorities,
    authorities_in,
    is_path,
    label,
    load,
)
from fumi_edge.tls.policy import CIPHERS, EXCLUDED_CIPHERS, IGNORE_UNEXPECTED_EOF
from fumi_edge.tls.read_watch import CURRENT_READ, WatchedSocket
from fumi_edge.tls.sources import Stamp, stamp


class ClientSocket(WatchedSocket):
    """The edge's side of a connection to a TLS server. ``on_end`` is called when its TLS ends, while its session is there."""

    on_end: Callable[[ClientSocket], None] | None = None
    explain: Callable[[OSError], OSError] | None = None
    """Returns an error of the connection with a text for operators."""
    verified_until = 0.0
    """Until when its session may be resumed, in seconds since 1970."""

    def do_handshake(self, block: bool = False) -> None:
        CURRENT_READ.begins(self)
        try:
            super().do_handshake(block)
        finally:
            CURRENT_READ.ends()

    def unwrap(self) -> socket.socket:
        self._end()
        return super().unwrap()

    def close(self) -> None:
        self._end()
        super().close()

    def _end(self) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(self)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The file of the CAs that sign backends' certificates, None for the system's, and the edge's own certificate, if any."""

    ca: str | None = None
    pair: Pair | None = None


class Reading(NamedTuple):
    """The result of reading the files: ``complaints`` has a line for each error; what has an error is as it was before.

    ``trust`` is the CAs as PEM or, for the system's, the state of their files. ``stamp`` is the state of the files before.
    """

    context: ssl.SSLContext
    trust: str | Stamp
    certificate: Certificate | None
    stamp: Stamp
    complaints: list[str]


class Credentials:
    """The CAs and the certificate in use. ``context`` is another one when they have changed, so that no session survives."""

    def __init__(self, settings: ClientSettings) -> None:
        """Read the files. Raises CertificateError."""
        self.settings = settings
        before = self.stamp()
        trust, certificate = self._read_trust(), self._read_certificate(None)
        self._current = Reading(self._context(trust, certificate), trust, certificate, before, [])

    @property
    def context(self) -> ssl.SSLContext:
        return self._current.context

    @property
    def certificate(self) -> Certificate | None:
        """The certificate that is shown to backends that request one."""
        return self._current.certificate

    @property
    def stamp_read(self) -> Stamp:
        """The ``stamp()`` from before the files were read: if it differs now, a file has changed."""
        return self._current.stamp

    def stamp(self) -> Stamp:
        """The state of all files, equal as long as no file changes."""
        pair = self.settings.pair
        return stamp([pair] if pair else [], self.settings.ca) + self._system()

    def files(self) -> list[str]:
        """The paths of the files that are read at a renewal."""
        sources = (self.settings.ca, *(self.settings.pair or ()))
        return list(dict.fromkeys(label(each) for each in sources if each is not None and is_path(each)))

    def read(self) -> Reading:
        """Read all files again without changing anything yet; this may be called in another thread."""
        before, current, complaints = self.stamp(), self._current, list[str]()
        trust, certificate = current.trust, current.certificate
        try:
            trust = self._read_trust()
        except CertificateError as error:
            complaints.append(str(error))
        try:
            certificate = self._read_certificate(certificate)
        except CertificateError as error:
            complaints.append(str(error))
        changed = trust != current.trust or certificate is not current.certificate
        context = self._context(trust, certificate) if changed else current.context
        return Reading(context, trust, certificate, before, complaints)

    def install(self, reading: Reading) -> None:
        """Use a reading for connections that begin from now on."""
        self._current = reading

    def renew(self) -> list[str]:
        """Read all files again, and use what is good. Returns a line for each error."""
        self.install(reading := self.read())
        return reading.complaints

    def validity_problems(self, now: float) -> list[str]:
        """A line for each of the certificates, own or CA, that is not valid at ``now`` (seconds since 1970)."""
        own = self.certificate
        problems = [own.validity_problem(now), *own.chain_problems(now)] if own is not None else []
        of_cas = [problem for each in self._cas() if (problem := each.validity_problem(now))]
        return [each for each in problems if each] + [f"{self.settings.ca}: {each}" for each in of_cas]

    def _cas(self) -> tuple[Authority, ...]:
        return authorities_in(self._current.trust) if isinstance(self._current.trust, str) else ()

    def _system(self) -> Stamp:
        """The state of the system's CAs, if they are used."""
        if self.settings.ca is not None:
            return ()
        paths = ssl.get_default_verify_paths()
        return stamp((), paths.cafile, paths.capath)

    def _read_trust(self) -> str | Stamp:
        if self.settings.ca is None:
            return self._system()
        found = authorities(self.settings.ca, "backend CA")
        try:
            _new_context().load_verify_locations(cadata=found)
        except ssl.SSLError as error:
            raise CertificateError(f"{self.settings.ca}: OpenSSL cannot read a CA certificate: {error.reason}") from None
        return found

    def _read_certificate(self, previous: Certificate | None) -> Certificate | None:
        if self.settings.pair is None:
            return None
        found = load(self.settings.pair, previous, of_client=True)
        if found is not previous:
            found.give(_new_context())
            now = time.time()
            if previous is not None and not previous.validity_problem(now) and (problem := found.validity_problem(now)):
                raise CertificateError(f"{problem}; the old certificate is valid and stays in use")
        return found

    @staticmethod
    def _context(trust: str | Stamp, certificate: Certificate | None) -> ssl.SSLContext:
        context = _new_context()
        if isinstance(trust, str):
            context.load_verify_locations(cadata=trust)
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        if certificate is not None:
            certificate.give(context)
        return context


def _new_context() -> ssl.SSLContext:
    """A context without trusted CAs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS + EXCLUDED_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.options &= ~IGNORE_UNEXPECTED_EOF
    context.hostname_checks_common_name = False
    context.sslsocket_class = ClientSocket
    return context
