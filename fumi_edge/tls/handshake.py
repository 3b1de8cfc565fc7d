"""The TLS handshake (RFC 8446 §4) on a raw non-blocking socket, driven by the loop's callbacks.

Nothing else wakes up between the steps; the walk awaits one pause. The reader stays registered afterwards: replacing it costs no
system call, removing and adding it costs two. It removes itself if bytes arrive before the tunnel replaces it.

It replaces a loop that awaits readable() and writable() (sockets/readiness.py) between the steps: its CPU is 0.90 (0.82 … 1.01)
of that in the row edge-handshake of ``ops/bench`` (5 rounds on a busy machine, Python 3.11.7). Delete it when edge-handshake with
such a loop is within 3 %. No private names are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from enum import StrEnum
from functools import lru_cache
from itertools import takewhile

from fumi_core.proxy_protocol import TLSInfo
from fumi_core.runtime.taskless import Pause
from fumi_edge.tls.pem import common_names
from fumi_edge.tls.policy import Policy, TLSSocket

HELLO_LIMIT = 4096
"""The maximum number of bytes of a ClientHello that are examined."""
CN_LIMIT = 1024
"""The maximum number of bytes of a common name in the PROXY header; X.520 (annex C) allows 64 characters."""
_CERTIFICATE_REASONS = ("CERTIFICATE", "UNKNOWN_CA")


class HandshakeResult(StrEnum):
    OK = "ok"
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"
    CERTIFICATE = "certificate"
    """A certificate was rejected: the client's by the edge, or the edge's by the client."""
    RESET = "reset"


class HandshakeError(Exception):
    """A failed handshake; the message is the error text of OpenSSL or the kernel."""

    def __init__(self, result: HandshakeResult, detail: str) -> None:
        super().__init__(detail)
        self.result = result


def classify(error: OSError) -> HandshakeError:
    """Classify an error: the client disconnected, a certificate was rejected, or the TLS protocol failed."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError) or not isinstance(error, ssl.SSLError):
        return HandshakeError(HandshakeResult.RESET, "the client disconnected")
    reason = error.reason or "unknown"
    detail = reason.lower().replace("_", " ")
    if isinstance(error, ssl.SSLCertVerificationError):
        return HandshakeError(HandshakeResult.CERTIFICATE, f"{detail}: {error.verify_message}")
    of_certificate = any(part in reason for part in _CERTIFICATE_REASONS)
    return HandshakeError(HandshakeResult.CERTIFICATE if of_certificate else HandshakeResult.PROTOCOL, detail)


def text_of(error: OSError) -> str | None:
    """The text for the log when reading from a client fails after the handshake; None if the client has only disconnected."""
    failure = classify(error)
    return None if failure.result is HandshakeResult.RESET else str(failure)


def server_name(hello: bytes) -> str | None:
    """The name in the server_name extension (RFC 6066 §3) of a ClientHello record; None without one, or when it is cut off."""
    try:
        at = 5 + 4 + 2 + 32  # the headers of record and message, version, random
        for size in (1, 2, 1):  # session id, cipher suites, compression methods
            at += size + int.from_bytes(hello[at : at + size])
        at += 2
        while at + 4 <= len(hello):
            kind, length = int.from_bytes(hello[at : at + 2]), int.from_bytes(hello[at + 2 : at + 4])
            if kind == 0:
                # A list with one entry: length of the list, type, length of the name, name.
                return hello[at + 9 : at + 4 + length].decode("ascii") or None if at + 4 + length <= len(hello) else None
            at += 4 + length
    except UnicodeDecodeError:
        pass
    return None


class Handshake(Pause[None]):
    """One handshake, from the start on; a coroutine awaits it. Raises HandshakeError there, as it does when its time is over.

    Call ``close()`` afterwards. If it has succeeded, the socket's reader may stay registered.
    """

    __slots__ = ("_deadlines", "_fd", "_loop", "_sock", "_writing", "done", "hello")

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: TLSSocket, deadlines: Deadlines, begun: float) -> None:
        """``begun`` is now, in the loop's time."""
        super().__init__()
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._deadlines = deadlines
        self._writing = False
        self.done = False
        """Whether it has succeeded."""
        self.hello: bytes | None = None
        """The first record, up to HELLO_LIMIT bytes."""
        loop.add_reader(self._fd, self._step)
        deadlines.begin(loop, self, begun)

    def _step(self) -> None:
        if self.ended:
            # These bytes are for the next reader.
            self._loop.remove_reader(self._fd)
            return
        try:
            if self.hello is None:
                # SSLSocket.recv() does not allow flags.
                self.hello = socket.socket.recv(self._sock, HELLO_LIMIT, socket.MSG_PEEK)
            self._sock.do_handshake()
        except BlockingIOError:
            pass
        except ssl.SSLWantReadError:
            if self._writing:
                self._wait_for_writing(False)
        except ssl.SSLWantWriteError:
            if not self._writing:
                self._wait_for_writing(True)
        except OSError as error:
            self.fail(classify(error))
        else:
            if self._writing:
                self._wait_for_writing(False)
            self.done = True
            self.end(None)

    def _wait_for_writing(self, wanted: bool) -> None:
        """Watch the socket for room to write, or for bytes to read as before."""
        self._writing = wanted
        if wanted:
            self._loop.remove_reader(self._fd)
            self._loop.add_writer(self._fd, self._step)
        else:
            self._loop.remove_writer(self._fd)
            self._loop.add_reader(self._fd, self._step)

    def expire(self) -> None:
        self.fail(HandshakeError(HandshakeResult.TIMEOUT, "the client sent nothing more in time"))

    def close(self) -> None:
        """Forget the deadline and, unless it has succeeded, stop watching the socket."""
        self._deadlines.end(self)
        if not self.done:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)


class Deadlines:
    """Handshakes that may each take the same number of ``seconds``: those that began first expire first, and share one timer."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[Handshake, float] = {}
        """The time when each expires, in the loop's time; in the order in which they began."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, handshake: Handshake, begun: float) -> None:
        """``begun`` is now, in the loop's time."""
        self._running[handshake] = deadline = begun + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._expire, loop)

    def end(self, handshake: Handshake) -> None:
        self._running.pop(handshake, None)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for handshake, _ in list(takewhile(lambda running: running[1] <= now, self._running.items())):
            self.end(handshake)
            handshake.expire()
        first = next(iter(self._running.values()), None)
        self._timer = None if first is None else loop.call_at(first, self._expire, loop)


def session(sock: TLSSocket, policy: Policy, hello: bytes) -> tuple[TLSInfo, bool]:
    """The session that a handshake has made, and whether it is resumed. Raises HandshakeError if the session has expired.

    ``policy`` is that of the handshake, and ``hello`` its first record.
    """
    version, resumed = sock.version(), bool(sock.session_reused)
    presented, common_name = False, None
    if policy.client_ca is not None:
        _check_session(sock)
        presented, common_name = _client_certificate(sock)
    if resumed and version == "TLSv1.2":
        # OpenSSL reports the name of the session, which may differ from the one requested now (RFC 6066 §3).
        sock.server_name = server_name(hello)
    cipher = sock.cipher()
    alpn = sock.selected_alpn_protocol() if policy.alpn else None
    # The handshake fails if the certificate does not verify.
    return _info(version, cipher and cipher[0], sock.server_name, alpn, presented, presented, common_name), resumed


# Most clients of a server have the same TLS version and cipher, and request the same name.
_info = lru_cache(256)(TLSInfo)


def _check_session(sock: TLSSocket) -> None:
    """Raise HandshakeError if a resumed session's client certificate has expired: OpenSSL does not verify it again."""
    if not sock.session_reused:
        return
    # Python cannot read a certificate with a name that is not valid text. Such a session ends after two hours, as all in TLS 1.2.
    with contextlib.suppress(ValueError):
        facts = sock.getpeercert()
        if facts and ssl.cert_time_to_seconds(str(facts["notAfter"])) < time.time():
            raise HandshakeError(HandshakeResult.CERTIFICATE, "certificate of the resumed session has expired")


def _client_certificate(sock: TLSSocket) -> tuple[bool, str | None]:
    """Return whether there is a client certificate, of this connection or the session it resumes, and its common name.

    The name is None if it is longer than CN_LIMIT: a shortened name might belong to another client.
    """
    try:
        facts = sock.getpeercert()
    except ValueError:
        # A CA has signed a name that is not valid text: there is a certificate, but its name is unknown.
        return True, None
    name = next(iter(common_names(facts)), None) if facts else None
    return bool(facts), name if name is None or len(name.encode("utf-8", "replace")) <= CN_LIMIT else None
