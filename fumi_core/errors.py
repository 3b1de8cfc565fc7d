"""The errors that a handler may raise or get, as types with the reply that each leads to."""

from __future__ import annotations


class SMTPError(Exception):
    """A reply other than success: ``code`` (400 to 599) and ``message``, which may begin with an enhanced status code.

    Raise it, or call ``ctx.reject``. A message of several lines becomes a multi-line reply.
    """

    def __init__(self, message: str, code: int = 550) -> None:
        """Raises ValueError for a code that is not a rejection (RFC 5321 §4.2.1: 4yz transient, 5yz permanent).

        Raises TypeError for a code that is not a whole number, as when code and message are in the wrong order.
        """
        if not isinstance(code, int):
            if isinstance(message, int):
                raise TypeError(f"the message comes first, then the code: write ({code!r}, {message!r})")
            raise TypeError(f"the code of a rejection is a whole number between 400 and 599, not {code!r}")
        if not 400 <= code <= 599:
            raise ValueError(f"the code of a rejection is between 400 and 599, not {code}")
        super().__init__(message)
        self.message = str(message)
        self.code = int(code)


class MessageAborted(Exception):
    """The message being read will never be complete: the client disconnected, sent invalid framing, or took too long."""
