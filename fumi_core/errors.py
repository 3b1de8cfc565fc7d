"""The exceptions that handlers raise or get, and the replies to which they lead."""

from __future__ import annotations


class SMTPError(Exception):
    """A rejection: the client gets ``code`` and ``message``. Raise it in a handler, or call ``ctx.reject()``, which raises it.

    ``message`` may begin with an enhanced status code; a message of several lines becomes a multi-line reply.
    """

    def __init__(self, message: str, code: int = 550) -> None:
        """``code`` is from 400 to 599 (RFC 5321 §4.2.1): with 4yz the client tries again later, with 5yz it gives up.

        Raises ValueError for another number, TypeError for anything else, such as a message (it comes first).
        """
        if not isinstance(code, int):
            if isinstance(message, int):
                raise TypeError(f"the message comes first, then the code: write ({code!r}, {message!r})")
            raise TypeError(f"the reply code must be a whole number, 400 to 599, not {code!r}")
        if not 400 <= code <= 599:
            raise ValueError(f"the reply code must be 400 to 599, not {code}")
        super().__init__(message)
        self.message = str(message)
        self.code = int(code)


class MessageAborted(Exception):
    """The message will not arrive completely: the client disconnected, sent invalid framing or took too long.

    Reading ``ctx.stream`` raises it. Handlers should let it propagate: the message is not accepted.
    """
