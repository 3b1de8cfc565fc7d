"""What the protocol tells the application. Those that ask are pending until they are accepted or refused."""

from __future__ import annotations

from fumi_core.smtp.replies import Reply
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Address


class Connect:
    """Asks: a client wants to be greeted."""

    __slots__ = ()


class Auth:
    """Asks: a client wants to be somebody."""

    __slots__ = ("credentials",)

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials


class AuthEnded:
    """Tells: AUTH ended before there were credentials to ask about.

    ``result`` is ``aborted`` when the client cancelled it, sent something malformed or is gone, and ``failed`` when it wanted to
    act for another user.
    """

    __slots__ = ("method", "result")

    def __init__(self, method: str, result: str) -> None:
        self.method = method
        self.result = result


class Mail:
    """Asks: MAIL wants to begin a transaction."""

    __slots__ = ("address",)

    def __init__(self, address: Address) -> None:
        self.address = address


class Rcpt:
    """Asks: RCPT wants to add a recipient."""

    __slots__ = ("address",)

    def __init__(self, address: Address) -> None:
        self.address = address


class MessageStart:
    """Tells: a message follows. ``command`` is what brings it: DATA or BDAT."""

    __slots__ = ("command",)

    def __init__(self, command: str) -> None:
        self.command = command


class MessageData:
    """Tells: a piece of the message's text."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        self.text = text


class MessageExcess:
    """Tells: the chunk that arrives makes the message too large, and is dropped."""

    __slots__ = ()


class ChunkEnd:
    """Asks: a chunk other than the last has arrived and wants its reply. A refusal ends the transaction."""

    __slots__ = ()


class ChunkDropped:
    """Tells: a chunk without a transaction arrives, and is dropped."""

    __slots__ = ()


class MessageEnd:
    """Asks: the message is whole and wants its reply."""

    __slots__ = ()


class MessageBroken:
    """Asks for patience: the message will never be whole, and its handlers are to end before anything else begins.

    ``reason`` is for the log, ``result`` for the metrics. ``command`` ended the transaction, and ``reply`` is its reply, which
    is sent when the handlers have ended: until then they have their envelope. Both are None when nothing more is said.
    """

    __slots__ = ("command", "reason", "reply", "result")

    def __init__(self, reason: str, result: str, command: str | None = None, reply: Reply | None = None) -> None:
        self.reason = reason
        self.result = result
        self.command = command
        self.reply = reply


Event = (
    Connect
    | Auth
    | AuthEnded
    | Mail
    | Rcpt
    | MessageStart
    | MessageData
    | MessageExcess
    | ChunkEnd
    | ChunkDropped
    | MessageEnd
    | MessageBroken
)
