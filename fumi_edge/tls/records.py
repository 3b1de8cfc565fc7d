"""Reading and writing a non-blocking TLS socket by whole records, and ending its direction to the peer.

The tunnel and the transport of the direct path both use it. In TLS a read may have to wait until the socket can be written, and a
write until it can be read: the results say so.
"""

from __future__ import annotations

import enum
import socket
import ssl

from fumi_edge.tls.close_notify import CloseNotify
from fumi_edge.tls.read_watch import CURRENT_READ

RECORD_SIZE = 16 * 1024
"""The maximum number of bytes in one TLS record (RFC 8446 §5.1)."""
LONG_RECORD = 1024
"""Bytes. After a shorter record, which is a command or a reply, a further read at once would find nothing."""


class After(enum.Enum):
    """What follows the bytes that were read: perhaps more, the end, or a wait until the socket can be written."""

    MORE = "more"
    ENDED = "ended"
    WANTS_WRITE = "wants write"


MORE, ENDED, WANTS_WRITE = After


def read_records(sock: ssl.SSLSocket, buffer: memoryview, streaming: bool) -> tuple[int, After | OSError]:
    """Decrypt one record, or all that have arrived, up to a full buffer. Returns (bytes, what follows).

    ``streaming`` tells that the last call returned at least LONG_RECORD bytes. Another record is read at once after a full one,
    and while streaming after a long one: a small message comes in one record, and finding nothing after it costs as much as
    reading it. If bytes are left unread, the event loop calls again.

    A read of RECORD_SIZE bytes takes a whole record, so OpenSSL holds back no decrypted bytes unknown to the event loop.
    When the connection or its TLS has failed, raises OSError or, if bytes were read before, returns it after them. A client that
    makes the read last is disconnected (read_watch.py).
    """
    CURRENT_READ.now = (sock,)
    count: int = 0
    got: int
    try:
        # With a buffer, read() returns the number of bytes.
        count = got = sock.read(RECORD_SIZE, buffer)  # type: ignore[assignment]
        if got == RECORD_SIZE or (streaming and got >= LONG_RECORD):
            last = len(buffer) - RECORD_SIZE
            while got and count <= last:
                got = sock.read(RECORD_SIZE, buffer[count:])  # type: ignore[assignment]
                count += got
    except ssl.SSLWantReadError:
        return count, MORE
    except ssl.SSLZeroReturnError:
        return count, ENDED
    except ssl.SSLWantWriteError:
        return count, WANTS_WRITE
    except OSError as error:
        if not count:
            raise
        return count, error
    finally:
        CURRENT_READ.now = None
    return count, MORE if got else ENDED


def arrived(sock: socket.socket) -> bytes | None:
    """What has arrived, up to RECORD_SIZE bytes; empty at the end, None when nothing has. Raises OSError.

    So many bytes take a whole TLS record, and OpenSSL holds back none, which no event would report.
    """
    try:
        return sock.recv(RECORD_SIZE)
    except (BlockingIOError, ssl.SSLWantReadError):
        return None


def write_records(sock: ssl.SSLSocket, data: bytes | memoryview) -> tuple[int, bool]:
    """Encrypt and send as much as the kernel takes. Returns the bytes taken, and whether the next write must wait for a read.

    Bytes that were not taken must be sent again first, as OpenSSL may hold a record of them. Raises OSError.
    """
    size = len(data)
    taken = 0
    try:
        taken = sock.send(data)
        if taken < size:
            view = memoryview(data)
            while taken < size:
                taken += sock.send(view[taken:])
    except ssl.SSLWantWriteError:
        pass
    except ssl.SSLWantReadError:
        return taken, True
    return taken, False


def send_end(sock: ssl.SSLSocket, close_notify: CloseNotify, unsent: bytes | None) -> bytes:
    """End our direction: send close_notify, in one packet with the FIN. Returns what is unsent; with b"" the end is sent.

    ``unsent`` is the result of the last call, None in the first one. Raises OSError.
    """
    if unsent is None:
        unsent = close_notify.record(sock)
    if unsent:
        try:
            unsent = unsent[socket.socket.send(sock, unsent, socket.MSG_MORE) :]
        except (BlockingIOError, InterruptedError):
            return unsent
    if not unsent:
        # Not sock.shutdown(), after which a TLS socket could not be read either.
        socket.socket.shutdown(sock, socket.SHUT_WR)
    return unsent
