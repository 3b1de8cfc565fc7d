"""TLS to a backend, as its client: the handshake, the sessions that are resumed, and texts for errors.

The certificate is verified in every full handshake, with no way around it (tls/credentials.py). In TLS 1.3 the tickets for later
connections arrive after the handshake, at a time of the server's choice (RFC 8446 §4.6.1), so a socket passes its session to its
backend when its TLS ends.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from ipaddress import ip_address
from typing import NamedTuple

from fumi_edge.metrics import BackendError
from fumi_edge.sockets.readiness import readable, send_all, writable
from fumi_edge.tls.credentials import ClientSocket, Credentials

SESSION_SECONDS = 7200.0
"""Seconds after a full handshake in which its session may be resumed. Without a limit it would be for ever, since each
resumption brings a new ticket."""

MAX_NAME_BYTES = 253
"""The maximum size in bytes of a host name, with its dots (RFC 1035 §2.3.4)."""

_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
_CLOSED = "closed the connection during the TLS handshake"
_ALERT = re.compile(r"_ALERT_(\w+)")
_UNKNOWN_CA = (2, 18, 19, 20, 21)
"""OpenSSL's codes for a chain that does not end at a trusted CA (openssl-verification-options(1))."""
_MISMATCH = (62, 64)
"""OpenSSL's codes for another host name or IP address."""


class TLSError(OSError):
    """TLS with a backend has failed; the message says why. ``reason`` is its label in the metrics."""

    def __init__(self, reason: BackendError, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class _Kept(NamedTuple):
    """A session, the context that it belongs to, and until when it may be resumed, in seconds since 1970."""

    session: ssl.SSLSession
    context: ssl.SSLContext
    until: float


class BackendTLS:
    """TLS with one backend, whose certificate must be for ``name``. Raises ValueError for a name that no certificate can have."""

    __slots__ = ("_kept", "credentials", "name")

    def __init__(self, credentials: Credentials, name: str) -> None:
        self.credentials = credentials
        self.name = name.removesuffix(".")
        self._kept: _Kept | None = None
        if not can_be_certified(self.name):
            raise ValueError(f"{name!r} is not a host name or an IP address, so no certificate can be for it")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (other.credentials, other.name) == (self.credentials, self.name)

    def __hash__(self) -> int:
        return hash((self.credentials, self.name))

    def copy_for_other_loop(self) -> BackendTLS:
        return BackendTLS(self.credentials, self.name)

    async def connect(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> ClientSocket:
        """Do the handshake on a connected non-blocking socket, and take it over. Raises TLSError."""
        context, kept = self.credentials.context, self._kept
        if kept is not None and (kept.context is not context or kept.until < time.time()):
            kept = self._kept = None
        try:
            wrapped = context.wrap_socket(
                sock,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
                server_hostname=self.name,
                session=kept and kept.session,
            )
        except OSError:
            raise TLSError(BackendError.TLS, _CLOSED) from None
        assert isinstance(wrapped, ClientSocket)
        try:
            await _handshake(loop, wrapped)
        except BaseException as error:
            self._kept = None
            wrapped.close()
            if isinstance(error, TimeoutError) or not isinstance(error, OSError):
                raise
            closed = _is_end(error) or not isinstance(error, ssl.SSLError)
            raise TLSError(BackendError.TLS, _CLOSED) if closed else self.explained(error) from None
        wrapped.verified_until = kept.until if kept and wrapped.session_reused else _verified_until(wrapped)
        wrapped.on_end, wrapped.explain = self._keep, self.explained
        return wrapped

    def _keep(self, sock: ClientSocket) -> None:
        """Keep the session of a connection that ends for the next ones, if it can be resumed."""
        session = sock.session
        if session is not None and (session.has_ticket or session.id) and sock.context is self.credentials.context:
            self._kept = _Kept(session, sock.context, sock.verified_until)

    async def send_first(self, loop: asyncio.AbstractEventLoop, sock: ClientSocket, data: bytes) -> None:
        """Send the first bytes. Raises TLSError: in TLS 1.3 the backend may have rejected our certificate in the meantime."""
        try:
            await send_all(loop, sock, data)
        except TimeoutError:
            raise
        except OSError as error:
            try:
                sock.recv(1)
            except ssl.SSLError as alert:
                error = error if isinstance(alert, ssl.SSLWantReadError) or _is_end(alert) else alert
            raise self.explained(error) from None

    def explained(self, error: OSError) -> OSError:
        """An error of the connection with a text for operators; errors other than TLS's are returned unchanged."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return TLSError(BackendError.CERTIFICATE, f"its certificate was rejected: {self._rejection(error)}")
        if _is_end(error):
            return TLSError(BackendError.TLS, "closed the connection without close_notify")
        if not isinstance(error, ssl.SSLError):
            return error
        reason = error.reason or "unknown error"
        alert = _ALERT.search(reason)
        if alert is None:
            text = reason.replace("_", " ").lower()
            hint = ": it may not speak TLS at this port" if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE") else ""
            return TLSError(BackendError.TLS, f"TLS has failed: {text}{hint}")
        return self._alerted(alert[1])

    def _rejection(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code in _MISMATCH:
            return f"it is not for {self.name}; --backend-name NAME is for one with another name"
        if error.verify_code in _UNKNOWN_CA:
            ca = self.credentials.settings.ca
            where = f"it is not from a CA in {ca}" if ca else "it is not from a CA of this system; --backend-ca FILE names others"
            return f"{where} ({error.verify_message})"
        return str(error.verify_message).rstrip(".")

    def _alerted(self, alert: str) -> TLSError:
        """The error for an alert of the backend."""
        text, own = alert.replace("_", " ").lower(), self.credentials.certificate
        if "CERTIFICATE" in alert or alert == "UNKNOWN_CA":
            what = f"rejected the certificate in {own.pair}" if own else "requires a certificate: name one with --backend-cert"
            return TLSError(BackendError.CERTIFICATE, f"{what} (alert: {text})")
        hint = "" if own or alert != "HANDSHAKE_FAILURE" else "; it may require a certificate: --backend-cert"
        return TLSError(BackendError.TLS, f"ended TLS with an alert: {text}{hint}")


def can_be_certified(name: str) -> bool:
    """Whether a certificate can be for this name: an IP address, or a host name in the form in which OpenSSL compares it.

    OpenSSL takes everything that is not an IP address for a name, and compares it with those of the certificate: an address in
    brackets, with a zone or in another form (``127.1``) never matches, nor does a name with a port. ``*`` in it would match only
    the same wildcard, and no server has such a name (RFC 9525 §6.1). Underscores match, and private CAs issue names with them.
    """
    try:
        return getattr(ip_address(name), "scope_id", None) is None
    except ValueError:
        pass
    try:
        # As Python's ssl does it.
        labels = name.encode("idna").decode("ascii").split(".")
    except UnicodeError:
        return False
    in_length = len(".".join(labels)) <= MAX_NAME_BYTES
    return in_length and all(map(_LABEL.fullmatch, labels)) and not _NUMBER.fullmatch(labels[-1])


def _is_end(error: OSError) -> bool:
    """Whether the backend has closed or reset the connection: Python's versions have different errors for it."""
    ends = ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError | ConnectionError
    return isinstance(error, ends) or getattr(error, "reason", None) == "UNEXPECTED_EOF_WHILE_READING"


async def _handshake(loop: asyncio.AbstractEventLoop, sock: ssl.SSLSocket) -> None:
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            await readable(loop, sock.fileno())
        except ssl.SSLWantWriteError:
            await writable(loop, sock.fileno())


def _verified_until(sock: ssl.SSLSocket) -> float:
    """Until when the session of a full handshake may be resumed: OpenSSL does not verify the certificate again."""
    latest = time.time() + SESSION_SECONDS
    try:
        return min(latest, ssl.cert_time_to_seconds(str((sock.getpeercert() or {})["notAfter"])))
    except (ValueError, KeyError):
        return 0.0  # Python cannot decode a certificate that has a name with invalid text


def explained(sock: socket.socket, error: OSError) -> OSError:
    """An error of a connection to a backend, of any kind, as ``BackendTLS.explained``."""
    return sock.explain(error) if isinstance(sock, ClientSocket) and sock.explain else error
