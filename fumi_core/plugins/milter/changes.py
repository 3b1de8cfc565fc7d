"""The changes that a filter makes to a message: collected while they arrive, applied after it has accepted the message."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterable, AsyncIterator, Iterator

from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import DataContext, MailContext, RcptContext
from fumi_core.handlers.spool import Spool
from fumi_core.plugins.milter.header import Field, HeaderReader, changed
from fumi_core.plugins.milter.wire import (
    AddHeader,
    AddRecipient,
    Change,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    InsertHeader,
    Malformed,
    Quarantine,
    ReplaceBody,
)
from fumi_core.smtp.replies import INSUFFICIENT_STORAGE
from fumi_core.smtp.session import Address, Session, address_key

MAX_CHANGES = 2_000
"""Changes of one message; each change of a field costs a search of all fields."""
MAX_CHANGE_BYTES = 1024 * 1024
"""Bytes of all changes of one message, which are kept in memory, without the new body."""
MAX_BODY_BYTES = 16 * 1024 * 1024
"""Bytes of a new body, or four times the message if that is more."""


class Changes:
    """One filter's changes of one message. ``close()`` frees the new body."""

    def __init__(self, message_size: int) -> None:
        self.quarantine: str | None = None
        self._fields: list[AddHeader | InsertHeader | ChangeHeader] = []
        self._envelope: list[AddRecipient | DeleteRecipient | ChangeSender] = []
        self._body: Spool | None = None
        self._max_body = max(MAX_BODY_BYTES, 4 * message_size)
        self._count = self._size = 0

    @property
    def of_envelope(self) -> bool:
        """Whether the sender or a recipient changes."""
        return bool(self._envelope)

    async def add(self, change: Change) -> None:
        """Raises Malformed when there are too many, and SMTPError 452 when the disk is full."""
        if isinstance(change, ReplaceBody):
            await self._add_body(change.text)
            return
        self._count += 1
        self._size += len(change.value) + len(change.name) if isinstance(change, AddHeader | InsertHeader | ChangeHeader) else 256
        if self._count > MAX_CHANGES or self._size > MAX_CHANGE_BYTES:
            raise Malformed("too many changes of one message")
        if isinstance(change, Quarantine):
            self.quarantine = change.reason
        elif isinstance(change, AddRecipient | DeleteRecipient | ChangeSender):
            self._envelope.append(change)
        else:
            self._fields.append(change)

    async def _add_body(self, text: bytes) -> None:
        if self._body is None:
            self._body = Spool()
        if self._body.size + len(text) > self._max_body:
            raise Malformed("the new body is too large")
        try:
            await self._body.write(text)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SMTPError(*INSUFFICIENT_STORAGE) from error
            raise

    def close(self) -> None:
        if self._body is not None:
            self._body.close()

    # When the filter has accepted the message

    def envelope(self, session: Session) -> tuple[Address | None, list[Address]]:
        """The sender and the recipients after the changes. Raises Malformed for an address that no client could send."""
        sender, recipients = session.envelope.mail_from, [(address_key(each.address), each) for each in session.envelope.rcpt_to]
        known = {key for key, _ in recipients}
        for change in self._envelope:
            key = address_key(change.address)
            if isinstance(change, ChangeSender):
                sender = self._sender(session, sender, change.address)
            elif isinstance(change, AddRecipient) and key not in known:
                known.add(key)
                recipients.append((key, self._recipient(session, change.address)))
            elif isinstance(change, DeleteRecipient) and key in known:
                known.remove(key)
                recipients = [each for each in recipients if each[0] != key]
        return sender, [each for _, each in recipients]

    def _sender(self, session: Session, old: Address | None, text: str) -> Address:
        context = MailContext(session, old or Address("", {}))
        with _malformed():
            context.address = context.address._replace(address=text)
        return context.address

    def _recipient(self, session: Session, text: str) -> Address:
        context = RcptContext(session, Address("", {}))
        with _malformed():
            context.address = Address(text, {})
        return context.address

    def message(self, ctx: DataContext, header: HeaderReader, leading_space: bool) -> AsyncIterator[bytes] | None:
        """The pieces of the changed message; None if header and body stay as they are."""
        if not self._fields and self._body is None:
            return None
        fields = changed(header.fields, self._fields, leading_space)
        body = _without(ctx.stream, header.size) if self._body is None else self._body.read()
        return _joined(fields, header.separator, body)


@contextlib.contextmanager
def _malformed() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise Malformed(str(error)) from None


async def _without(pieces: AsyncIterable[bytes], size: int) -> AsyncIterator[bytes]:
    """The pieces without the first ``size`` bytes."""
    async for piece in pieces:
        skipped = min(size, len(piece))
        size -= skipped
        if skipped < len(piece):
            yield piece[skipped:]


async def _joined(fields: list[Field], separator: bool, body: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    yield b"".join(field.text + b"\r\n" for field in fields) + b"\r\n" * separator
    async for piece in body:
        if not separator and piece:
            yield b"\r\n"
            separator = True
        yield piece
