"""The contexts that handlers get, one class for each phase. All have ``session`` and ``reject(message, code)``."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
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
    """What all contexts have: the connection's ``session``, and ``reject()``."""

    __slots__ = ("session",)
    hook: ClassVar[str]
    """The method of ``Fumi`` that adds its handlers, for the log."""
    command: str | None = None
    """The SMTP command that the handlers decide about, for the log; None if there is none."""
    default_code: ClassVar[int] = 550
    default_status: ClassVar[str | None] = None
    """The enhanced status code that goes with ``default_code`` if the message has none; None means the usual one."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def reject(self, message: str, code: int | None = None) -> NoReturn:
        """Reject with this reply, by raising SMTPError.

        ``message`` may begin with an enhanced status code. ``code`` is from 400 to 599; each phase has its own default. Raises
        TypeError and ValueError for another code.
        """
        raise SMTPError(message, self.default_code if code is None else code)


class ConnectContext(Context):
    """A client has connected. The PROXY header has been read, if one is required; the banner has not been sent yet."""

    __slots__ = ()
    hook = "on_connect"


class AuthContext(Context):
    """A client authenticates with ``credentials``, a Credentials. Call ``accept()``, or the client gets 535."""

    __slots__ = ("accepted", "credentials", "user")
    hook = "on_auth"
    command = "AUTH"
    default_code = 535

    def __init__(self, session: Session, credentials: Credentials) -> None:
        self.session = session
        self.credentials = credentials
        self.accepted = False
        self.user: Any = None

    def accept(self, user: Any) -> None:
        """Authenticate the client as ``user``, which ``session.user`` is from then on. Raises ValueError for None."""
        if user is None:
            raise ValueError("accept() needs a user: None means that the client has not authenticated")
        self.accepted = True
        self.user = user


class AddressContext(Context):
    """MAIL or RCPT. Assigning ``address`` changes it for the later handlers, the envelope and the delivery target."""

    __slots__ = ("_address",)

    def __init__(self, session: Session, address: Address) -> None:
        self.session = session
        self._address = address

    @property
    def address(self) -> Address:
        """The address of the command, with its parameters."""
        return self._address

    @address.setter
    def address(self, address: Address) -> None:
        """Raises TypeError for anything but an Address, ValueError for one that no client could send (RFC 5321 §4.1.2)."""
        if not isinstance(address, Address):
            raise TypeError(f"ctx.address is an Address, as in ctx.address._replace(address='joe@example.org'), not {address!r}")
        if not self._is_path(address.address):
            raise ValueError(f"{address.address!r} is not a valid address for {self.command}")
        self._address = address

    def _is_path(self, text: str) -> bool:
        """Whether a client could have sent this address, with or without ``lenient_addresses``."""
        keyword, at = ("FROM", 0) if self.command == "MAIL" else ("TO", 1)
        parsed = [parse_path(paths(lenient)[at], f"{keyword}:<{text}>") for lenient in (False, True)]
        return any(each is not None and each.address == text for each in parsed)


class MailContext(AddressContext):
    """MAIL: ``address`` is the reverse-path. ``address.address`` is "" for the null sender, ``<>``."""

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
    """A message arrives: ``stream`` is its content, an async iterator of bytes. ``accept(text)`` sets the text of the 250 reply.

    In LMTP each recipient has its own reply: ``reject_recipient()`` rejects the message for one of them.
    """

    __slots__ = ("_recipients", "accepted", "command", "rejected", "stream")
    hook = "on_data"
    default_code = 552
    default_status = "5.7.1"  # the usual one, 5.3.4, means that the message is too large

    def __init__(
        self, session: Session, stream: MessageStream, command: str = "DATA", recipients: Sequence[Address] | None = None
    ) -> None:
        """``recipients`` are those that get a reply of their own: all of them in LMTP; None in SMTP."""
        self.session = session
        self._recipients = recipients
        self.stream = stream
        self.command = command
        self.accepted: str | None = None
        self.rejected: dict[str, SMTPError] = {}

    @property
    def size_exceeded(self) -> bool:
        """Whether the message is larger than the option ``size``; it is then answered 552, whatever the handlers decide."""
        return self.stream.size_exceeded

    async def spool(self) -> None:
        """Receive the whole message and keep it, so that this handler and the later ones can read it several times.

        Up to 256 KiB are kept in memory, more in an unlinked temporary file, until the handlers have ended. Raises RuntimeError
        if the message has already been read, SMTPError 452 if the disk is full, and MessageAborted if the message ends early.
        """
        await self.stream.spool()

    def replace(self, text: bytes | AsyncIterable[bytes]) -> None:
        """Replace the message for the later handlers, by bytes or by what an async iterator yields.

        The iterator may read ``ctx.stream``. Line ends become CRLF, unless the message has BODY=BINARYMIME (RFC 3030 §3). Raises
        TypeError for anything else.
        """
        self.stream = Replacement(self.stream, text, self.session.envelope.body == "BINARYMIME")

    async def message(self) -> EmailMessage:
        """Return the parsed message (RFC 5322). Spools the message, so it can still be read. Raises as ``spool()`` does."""
        return await self.stream.message(SMTPUTF8 if self.session.envelope.smtputf8 else SMTP)

    def accept(self, text: str) -> None:
        """Set the text of the 250 reply, which is sent if no handler rejects the message."""
        self.accepted = str(text)

    def reject_recipient(self, address: str, message: str, code: int = 550) -> None:
        """Reject the message for this recipient, in LMTP only.

        Raises ValueError for a code outside 400 to 599, LookupError for an address that is not a recipient. In SMTP it raises
        RuntimeError: there one reply is for all recipients, and would accept the message for this one too.
        """
        if self._recipients is None:
            raise RuntimeError(
                "reject_recipient() is for LMTP: in SMTP call ctx.reject(message, code), which is for all recipients"
            )
        if address not in [each.address for each in self._recipients]:
            raise LookupError(f"{address!r} is not a recipient of this message")
        self.rejected[address] = SMTPError(message, code)


class CloseContext(Context):
    """The connection has ended. No reply can be sent any more."""

    __slots__ = ()
    hook = "on_close"
