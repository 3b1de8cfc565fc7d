"""The events that the protocol reports. Those marked "Decision" are pending until the application accepts or refuses them."""

from __future__ import annotations

from fumi_core.smtp.replies import Reply
from fumi_core.smtp.results import AuthResult, MessageResult
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Address


class Connect:
    """Decision: a client has connected and waits for the banner."""

    __slots__ = ()


class Auth:
    """Decision: a client has sent credentials."""

    __slots__ = ("credentials",)

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials


class AuthEnded:
    """Information: AUTH ended without credentials, or failed because the client requested to act for another user."""

    __slots__ = ("method", "result")

    def __init__(self, method: str, result: AuthResult) -> None:
        self.method = method
        self.result = result


class Mail:
    """Decision: MAIL, to begin a transaction."""

    __slots__ = ("address",)

    def __init__(self, address: Address) -> None:
        self.address = address


class Rcpt:
    """Decision: RCPT, to add a recipient."""

    __slots__ = ("address",)

    def __init__(self, address: Address) -> None:
        self.address = address


class MessageStart:
    """Information: a message follows. ``command`` is DATA or BDAT."""

    __slots__ = ("command",)

    def __init__(self, command: str) -> None:
        self.command = command


class MessageData:
    """Information: a piece of the message's content."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        self.text = text


class MessageExcess:
    """Information: the arriving chunk makes the message too large, and is dropped."""

    __slots__ = ()


class ChunkEnd:
    """Decision: a chunk other than the last has arrived and needs a reply. A rejection ends the transaction."""

    __slots__ = ()


class ChunkDropped:
    """Information: a chunk without a transaction is arriving, and is dropped."""

    __slots__ = ()


class MessageEnd:
    """Decision: the whole message has arrived and needs a reply."""

    __slots__ = ()


class MessageBroken:
    """Decision: the message will never be complete. Accept this when its handlers have ended; until then no command is processed.

    ``reason`` is for the log, ``result`` for the metrics. ``command`` ended the transaction, and ``reply`` is its reply, which is
    sent when the handlers have ended: until then they have their envelope. Both are None when no reply is sent.
    """

    __slots__ = ("command", "reason", "reply", "result")

    def __init__(self, reason: str, result: MessageResult, command: str | None = None, reply: Reply | None = None) -> None:
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
