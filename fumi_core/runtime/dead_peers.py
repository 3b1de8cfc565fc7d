"""Ends TCP connections whose peer has vanished: its host, or the network between, is down.

Neither side closes such a connection, and with the kernel's defaults it ends after 15 minutes with data in flight (tcp_retries2)
and two hours without (tcp_keepalive_time). All options are here (tcp(7)):

- Data that is not acknowledged for USER_TIMEOUT_SECONDS: TCP_USER_TIMEOUT. Linux ends the connection when it would retransmit
  next, which by default is after 0.2, 0.6, 1.4, 3, 6.2, 12.6 and 25.4 seconds, or when the time has passed. But when the last
  packet was answered by "host unreachable", as this host's own ARP does when it fails, the next retransmission is set anew,
  without regard to the user timeout (RFC 6069; tcp_ld_RTO_revert()): 38 to 42 seconds were measured. TCP_RTO_MAX_MS, which
  Linux has since 6.15, therefore limits the pause between retransmissions to RETRANSMIT_SECONDS. For the same time at most, a
  connection waits to go on when the network is back.
- Nothing in flight: a keepalive probe after KEEPALIVE_IDLE_SECONDS of silence, then one every KEEPALIVE_INTERVAL_SECONDS until
  one is answered. Where there is a user timeout, Linux does not count them: it ends the connection when the peer has been silent
  for that long and one probe is unanswered. If the first probe came later than that, one lost packet would end a session. With
  these numbers ten must be lost, and connections survive fifteen seconds without network.

A user timeout also ends a connection whose peer is alive and acknowledges, but has kept its window closed for that long: a server
that does not read because its handlers or its disk are slow. ``check_window()`` therefore suspends it while a window is closed.

A listening socket passes its options on to those that it accepts, without a system call for each.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys

USER_TIMEOUT_SECONDS = 30
RETRANSMIT_SECONDS = 3
"""Not 2: Linux also ends a connection after 15 unanswered probes of a closed window (tcp_retries2), which would be 27 seconds."""
KEEPALIVE_IDLE_SECONDS = 10
KEEPALIVE_INTERVAL_SECONDS = 2
KEEPALIVE_PROBES = 10
"""For systems without a user timeout, and connections without one: 10 + 10 x 2 = 30 seconds."""
CHECK_SECONDS = 10.0
"""Seconds between two calls of ``check_window()`` for a connection, at most: well within the user timeout."""

_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
_TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)
_OPTIONS = [
    (getattr(socket, name), value)
    for name, value in (
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_SECONDS * 1000),
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    )
    if hasattr(socket, name)
]
"""Those that this system has."""
_TCP_RTO_MAX_MS = 44
"""Of linux/tcp.h; Python does not name it."""
_IN_FLIGHT = struct.Struct("3xB20xI28xI84xI")
"""tcpi_probes, tcpi_unacked (segments), tcpi_last_ack_recv (milliseconds ago) and tcpi_notsent_bytes of struct tcp_info
(linux/tcp.h; Linux 4.6 and newer)."""
_DEAD_PROBES = 3
"""Consecutive unanswered probes of a closed window after which a peer that has been silent for the user timeout counts as
vanished: two may have been lost."""


def detect_dead_peer(sock: socket.socket) -> None:
    """Set the options on a TCP socket that listens or is to be connected. Other sockets stay as they are."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _OPTIONS:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # before 6.15
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, RETRANSMIT_SECONDS * 1000)


def check_window(sock: socket.socket) -> bool:
    """Suspend the user timeout of a connection while the peer's window is closed, and resume it when data flows again.

    To be called every CHECK_SECONDS while data may be unacknowledged. Returns False when all of it is acknowledged, or the system
    has no user timeouts.

    A peer that is alive answers the kernel's probes of its window. A host that dies meanwhile does not, and nor does one that can
    no longer be sent to: a packet that cannot leave this host is not in flight.
    """
    if _USER_TIMEOUT is None or _TCP_INFO is None or sock.family == socket.AF_UNIX:
        return False
    try:
        probes, unacked, silent_ms, notsent = _IN_FLIGHT.unpack(sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _IN_FLIGHT.size))
        vanished = probes >= _DEAD_PROBES and silent_ms >= USER_TIMEOUT_SECONDS * 1000
        if unacked or (notsent and vanished):
            if not sock.getsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT):
                sock.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, USER_TIMEOUT_SECONDS * 1000)
        elif notsent and not probes:
            # Nothing is in flight although there is something to send, and the last probe was answered.
            sock.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, 0)
    except (OSError, struct.error):
        return True  # it has ended, which is handled elsewhere, or this kernel is too old
    return bool(unacked or notsent)
