"""What a handler gets, one class a phase. All have ``session`` and ``reject(message, code)``, which raises SMTPError."""

from __future__ import annotations

from collections.abc import AsyncIterable
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from typing import Any, ClassVar, NoReturn

from fumi_core.errors import SMTPError
from fumi_core.handlers.replacement import Replacement
from fumi_core.handlers.stream import MessageStream
from fumi_core.smtp.grammar import parse_path, paths
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Address, Session


class Context:
    """The connection's ``session``, and the way to reject."""

    __slots__ = ("session",)
    hook: ClassVar[str]
    """What its handlers are registered by, for the log."""
    command: str | None = None
    """The SMTP command that the handlers decide about, for the log; None where there is none."""
    default_code: ClassVar[int] = 550
    default_status: ClassVar[str | None] = None
    """The enhanced status code for ``default_code``, where the message has none; None is the usual one."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def reject(self, message: str, code: int | None = None) -> NoReturn:
        """Reply with this rejection: ``message`` first, then ``code``. Raises SMTPError.

        Raises TypeError and ValueError for a code that is not a whole number from 400 to 599.
        """
        raise SMTPError(message, self.default_code if code is None else code)


class ConnectContext(Context):
    """A client has connected, and the PROXY header, if one is required, was read; no banner was sent."""

    __slots__ = ()
    hook = "on_connect"


class AuthContext(Context):
    """A client wants to authenticate: ``credentials`` says how and as whom. Accept it, or it is refused with 535."""

    __slots__ = ("accepted", "credentials", "user")
    hook = "on_auth"
    command = "AUTH"
    default_code = 535

    def __init__(self, session: Session, credentials: Credentials) -> None:
        super().__init__(session)
        self.credentials = credentials
        self.accepted = False
        self.user: Any = None

    def accept(self, user: Any) -> None:
        """Let the client in; ``session.user`` is then ``user``. Raises ValueError for None, which is nobody."""
        if user is None:
            raise ValueError("accept(user) needs a user: None is a client that did not authenticate")
        self.accepted = True
        self.user = user


class AddressContext(Context):
    """MAIL or RCPT. An ``Address`` assigned to ``address`` takes its place for later handlers, the envelope and the delivery."""

    __slots__ = ("_address",)

    def __init__(self, session: Session, address: Address) -> None:
        super().__init__(session)
        self._address = address

    @property
    def address(self) -> Address:
        """The address and its parameters."""
        return self._address

    @address.setter
    def address(self, address: Address) -> None:
        """Raises TypeError for what is not an Address, ValueError for text that is no address (RFC 5321 §4.1.2)."""
        if not isinstance(address, Address):
            raise TypeError(f"ctx.address is an Address, as in ctx.address._replace(address='joe@example.org'), not {address!r}")
        if not self._is_path(address.address):
            raise ValueError(f"{address.address!r} is not an address that {self.command} can have")
        self._address = address

    def _is_path(self, text: str) -> bool:
        """Whether a client, too, could have sent this address."""
        keyword, at = ("FROM", 0) if self.command == "MAIL" else ("TO", 1)
        parsed = [parse_path(paths(lenient)[at], f"{keyword}:<{text}>") for lenient in (False, True)]
        return any(each is not None and each.address == text for each in parsed)


class MailContext(AddressContext):
    """MAIL: ``address`` is the reverse-path, its address "" for ``<>``."""

    __slots__ = ()
    hook = "on_mail_from"
    command = "MAIL"


class RcptContext(AddressContext):
    """RCPT: ``address`` is the forward-path."""

    __slots__ = ()
    hook = "on_rcpt_to"
    command = "RCPT"
    default_status = "5.1.1"


class DataContext(Context):
    """The message: ``stream`` is its text. ``accept(text)`` chooses the words of the 250.

    In LMTP every recipient has a reply of its own: ``reject_recipient`` refuses it to one, and the rest get it.
    """

    __slots__ = ("accepted", "command", "rejected", "stream")
    hook = "on_data"
    default_code = 552
    default_status = "5.7.1"  # 5.3.4, the usual one, means too large

    def __init__(self, session: Session, stream: MessageStream, command: str = "DATA") -> None:
        super().__init__(session)
        self.stream = stream
        self.command = command
        self.accepted: str | None = None
        self.rejected: dict[str, SMTPError] = {}

    @property
    def size_exceeded(self) -> bool:
        return self.stream.size_exceeded

    async def spool(self) -> None:
        """Keep the whole message, so that this handler and those after it can read it any number of times.

        Up to 256 KiB are kept in memory, more in an unlinked temporary file, until the handlers have ended. Raises RuntimeError
        when the message was read already, SMTPError 452 when the disk is full, MessageAborted.
        """
        await self.stream.spool()

    def replace(self, text: bytes | AsyncIterable[bytes]) -> None:
        """Give the handlers after this one another message, as bytes or as what an async iterator of bytes yields.

        The iterator may read ``ctx.stream``. Line ends become CRLF, unless the message has BODY=BINARYMIME (RFC 3030 §3).
        """
        self.stream = Replacement(self.stream, text, self.session.envelope.body == "BINARYMIME")

    async def message(self) -> EmailMessage:
        """The message, parsed (RFC 5322). It is kept, so it can still be read. Raises as ``spool()`` does."""
        return await self.stream.message(SMTPUTF8 if self.session.envelope.smtputf8 else SMTP)

    def accept(self, text: str) -> None:
        """Answer 250 with these words, once the chain has ended without a refusal."""
        self.accepted = str(text)

    def reject_recipient(self, address: str, message: str, code: int = 550) -> None:
        """LMTP alone: refuse the message for this recipient.

        Raises ValueError for a code outside 400 to 599, LookupError for an address that is no recipient.
        """
        if address not in [each.address for each in self.session.envelope.rcpt_to]:
            raise LookupError(f"{address!r} is not a recipient of this message")
        self.rejected[address] = SMTPError(message, code)


class CloseContext(Context):
    """The connection is gone; there is nobody left to reject."""

    __slots__ = ()
    hook = "on_close"
