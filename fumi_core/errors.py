"""What can go wrong in a handler's hands, as types with the reply each leads to."""

from __future__ import annotations


class SMTPError(Exception):
    """An answer other than success: ``code`` (400 to 599) and ``message``, which may begin with an enhanced status code.

    Raise it, or call ``ctx.reject``. A message of several lines becomes a multi-line reply.
    """

    def __init__(self, message: str, code: int = 550) -> None:
        """Raises ValueError for a code that is not a refusal (RFC 5321 §4.2.1: 4yz transient, 5yz permanent)."""
        if not 400 <= code <= 599:
            raise ValueError(f"a refusal's code is between 400 and 599, not {code}")
        super().__init__(message)
        self.message = str(message)
        self.code = code


class MessageAborted(Exception):
    """The message being read will never be whole: the client went away, broke the framing, or took too long."""
