"""Why a connection ended, and the exceptions by which a step of its walk ends it early. ``walk.py`` logs the end."""

from __future__ import annotations

from enum import StrEnum


class End(StrEnum):
    """The ``reason`` of the line ``connection ended``; the README describes each, in this order."""

    BACKEND_CLOSED = "backend_closed"
    CLIENT_CLOSED = "client_closed"
    BACKEND_RESET = "backend_reset"
    CLIENT_RESET = "client_reset"
    IDLE_TIMEOUT = "idle_timeout"
    LINGER = "linger"
    SHUTDOWN = "shutdown"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    HANDSHAKE_PROTOCOL = "handshake_protocol"
    HANDSHAKE_CERTIFICATE = "handshake_certificate"
    HANDSHAKE_RESET = "handshake_reset"
    NO_BACKEND = "no_backend"
    BACKEND_REFUSED = "backend_refused"
    INJECTION = "injection"
    NOT_SMTP = "not_smtp"
    ERRORS = "errors"
    PROXY_HEADER = "proxy_header"
    MAX_CLIENTS_PER_IP = "max_clients_per_ip"
    RATE = "rate"
    ERROR = "error"


CLOSE_AT_ONCE = (
    *(End.CLIENT_CLOSED, End.CLIENT_RESET, End.HANDSHAKE_TIMEOUT, End.HANDSHAKE_RESET),
    *(End.PROXY_HEADER, End.MAX_CLIENTS_PER_IP, End.RATE),
)
"""Ends without a reply after which the connection is closed at once: the client has disconnected, or must take no more time."""
SILENCES = (End.CLIENT_CLOSED, End.CLIENT_RESET, End.IDLE_TIMEOUT, End.HANDSHAKE_TIMEOUT, End.HANDSHAKE_RESET)
"""Ends that mean a check of the port if the client has sent no bytes."""
INCOMPLETE = (End.CLIENT_RESET, End.IDLE_TIMEOUT, End.LINGER, End.SHUTDOWN)
"""Ends that the backend must see as a reset, because the client has not ended the connection."""


class Ended(Exception):
    """Ends the connection. ``reply`` is the last reply to the client.

    With ``after_command`` it is sent after the client's next command, because the client does not expect a reply before.
    """

    def __init__(self, reason: End, reply: bytes = b"", after_command: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply = reply
        self.after_command = after_command


class NoBanner(Exception):
    """The backend closed before its banner, and the client has sent nothing yet: another backend can be tried.

    ``error`` is the error of the connection, if there was one.
    """

    def __init__(self, error: OSError | None = None) -> None:
        super().__init__()
        self.error = error
