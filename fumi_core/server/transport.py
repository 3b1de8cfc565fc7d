"""The interface between a connection and its socket: the methods that a ``Connection`` calls, and those of it that are called.

``socket_transport`` has the transport for plaintext. A transport is owned by one connection, and both run in one event loop.
"""

from __future__ import annotations

from typing import Protocol


class Transport(Protocol):
    """A stream to and from the client, read from the beginning on.

    No method raises, and none calls the owner back at once. An error ends the stream as ``abort()`` does; after that no method
    does anything.
    """

    @property
    def blocked(self) -> bool:
        """Whether output waits for the client to read."""

    def write(self, data: bytes) -> None:
        """Send now, or as soon as the client reads. Not called after ``close()`` or ``write_eof()``."""

    def write_eof(self) -> None:
        """Half-close the connection after all output is sent: the client may go on sending."""

    def pause_reading(self) -> None:
        """Make no calls of ``received()`` and ``ended()`` until ``resume_reading()``. Nothing happens if it is paused already."""

    def resume_reading(self) -> None:
        """Undo ``pause_reading()``. Nothing happens if it is not paused, or the client's side has ended."""

    def check_window(self) -> None:
        """See ``runtime/dead_peers.py``; called every few seconds."""

    def close(self) -> None:
        """Read no more, send the waiting output, and close; then ``lost()`` is called."""

    def abort(self) -> None:
        """Close at once, without sending the waiting output; then ``lost()`` is called."""


class TransportOwner(Protocol):
    """Receives a transport's events, each in a call from the event loop and never from inside a call to the transport."""

    def received(self, data: bytes) -> None:
        """The client sent these bytes, at least one."""

    def ended(self) -> None:
        """The client will send no more. Nothing more is read; writing goes on."""

    def drained(self) -> None:
        """All output that waited was sent: ``blocked`` is False again."""

    def lost(self) -> None:
        """The connection has ended; no method is called after this."""
