"""Remembers an LMTP next hop's reply for each recipient, where the client speaks SMTP and gets one reply for all of them.

When the replies differ, the client gets a 451 and sends the whole message again. Then

- a recipient that has the message is answered 250 and gets no second copy: decided at the end of the message, by a hash of its
  content, so another message is never mistaken for it;
- a recipient that was rejected is rejected at RCPT, with the next hop's reply, so that the client bounces only this recipient.
  The content is not known at RCPT, so this is decided by what clients repeat when they retry: reverse-path, recipient, SIZE,
  ENVID, login, and the client's network where there is no SIZE. Another message with all of these in common is rejected by
  mistake; but only once, since a reply used at RCPT is deleted, and only if the first message was not sent again before.

Two deliveries of one message to several recipients never overlap, in all workers: see ``message_locks``. If the database (see
``reply_store``) is missing or fails, nothing is remembered: one warning is logged, and recipients that have the message may get
it again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from fumi_core.client.replies import ReceivedReply
from fumi_core.delivery.next_hop.message_locks import MessageLocks
from fumi_core.delivery.next_hop.reply_store import Remembered, ReplyStore
from fumi_core.runtime.addresses import block_of
from fumi_core.runtime.logs import event
from fumi_core.smtp.session import Address, Session

T = TypeVar("T")
D = TypeVar("D")
_log = logging.getLogger("fumi.core")

DATABASE_TIMEOUT = 10.0
"""Seconds to wait for the database."""
OTHER_DELIVERY_TIMEOUT = 30.0
"""Seconds to wait for another delivery of the same message, whose client has probably disconnected."""
POLL_SECONDS = 0.02
"""Seconds between two checks whether it has ended."""
MAX_TEXT_LENGTH = 2000
"""Characters of a reply that are kept."""


class ReplyMemory:
    """The replies remembered in ``directory``. No method except ``prepare()`` raises OSError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._store = ReplyStore(directory)
        self._locks = MessageLocks(directory / "locks")
        self._empty_at: bytes | None = None
        self._failing = False

    def prepare(self) -> None:
        """Create the directory and the database if they do not exist. Raises OSError when they cannot be used."""
        self._store.prepare()
        try:
            self._locks.stamp()
        finally:
            self._locks.close()  # each worker opens it for itself

    def startup_problem(self) -> str | None:
        """Why ``prepare()`` would fail; None if it would not. Creates nothing."""
        there = next(each for each in (self.directory.absolute(), *self.directory.absolute().parents) if each.exists())
        if not there.is_dir():
            return f"{there} is not a directory"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"cannot write to {there}"
        return self._store.startup_problem()

    def close(self) -> None:
        self._store.close()

    def replies(self, session: Session, sender: Address) -> MessageReplies:
        """The replies to the message that begins with this MAIL."""
        return MessageReplies(self, sender.address, attempt_of(session, sender))

    def _is_empty(self) -> bool:
        """True if certainly nothing is remembered; makes no query of the database."""
        try:
            return self._empty_at is not None and self._locks.stamp() == self._empty_at
        except OSError:
            return False

    async def of_recipient(self, sender: str, recipient: str) -> list[Remembered] | None:
        """The replies to this recipient of all messages from ``sender``; None when the database fails."""
        if self._is_empty():
            return []
        try:
            stamp = self._locks.stamp()
        except OSError as error:
            self._failed(error)
            return None
        result = await self.result(self._store.of_recipient(sender, recipient), None)
        if result is None:
            return None
        found, empty = result
        if empty:
            self._empty_at = stamp
        return found

    async def of_message(self, sender: str, digest: bytes) -> list[Remembered]:
        return [] if self._is_empty() else await self.result(self._store.of_message(sender, digest), [])

    def record(self, sender: str, replies: Iterable[Remembered]) -> asyncio.Future[None]:
        future = self._store.record(sender, replies)
        future.add_done_callback(self._recorded)
        return future

    def forget(self, sender: str, digest: bytes, recipients: Iterable[str]) -> asyncio.Future[None]:
        future = self._store.forget(sender, digest, recipients)
        future.add_done_callback(self._done)
        return future

    async def claim(self, digest: bytes, alone: bool) -> bool:
        """Wait until no other delivery of this message is in progress; False when that takes too long.

        ``alone`` keeps other deliveries from beginning, until ``release()``.
        """
        try:
            async with asyncio.timeout(OTHER_DELIVERY_TIMEOUT):
                while not (self._locks.acquire(digest) if alone else self._locks.is_free(digest)):
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            return False
        except OSError as error:
            self._failed(error)
        return True

    def release(self, digest: bytes) -> None:
        self._locks.release(digest)

    async def result(self, future: asyncio.Future[T], otherwise: D) -> T | D:
        """The database's result; ``otherwise`` when it fails or takes too long."""
        try:
            async with asyncio.timeout(DATABASE_TIMEOUT):
                result = await future
        except (OSError, TimeoutError) as error:
            self._failed(error)
            return otherwise
        self._failing = False
        return result

    def _recorded(self, future: asyncio.Future[None]) -> None:
        try:
            self._locks.change_stamp()
        except OSError as error:
            self._failed(error)
        self._done(future)

    def _done(self, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if not self._failing:
            self._failing = True
            words = "cannot store replies to recipients: some may get a message twice"
            reason = getattr(error, "strerror", None) or str(error) or "disk timeout"
            event(_log, logging.WARNING, words, state=self.directory, error=reason)


class MessageReplies:
    """The replies to the recipients of one message. Feed ``hash`` the message's content."""

    def __init__(self, memory: ReplyMemory, sender: str, attempt: bytes) -> None:
        self.hash = blake2b(digest_size=32)
        self._memory = memory
        self._sender = sender
        self._attempt = attempt
        self._found: dict[str, list[Remembered]] = {}
        self._lookups_fail = False
        """The database has failed once; the client does not wait for it again at each recipient."""
        self._digest = b""
        self._locked = False
        self._recorded: set[str] = set()
        self._delivered: dict[str, ReceivedReply] = {}
        self._agreed = False

    # Before the content is known

    def may_know(self, recipients: Iterable[str]) -> bool:
        """Whether the message may already have a reply for one of these recipients."""
        return any(each in self._found for each in recipients)

    async def recall(self, recipient: str) -> ReceivedReply | None:
        """The reply that the message probably has for this recipient. A rejection is deleted by this call."""
        found = None if self._lookups_fail else await self._memory.of_recipient(self._sender, recipient)
        self._lookups_fail = found is None
        if not found:
            return None
        self._found[recipient] = found
        likely = [each for each in found if each.attempt == self._attempt]
        if len(likely) != 1:
            return None  # several messages match, so the reply is ambiguous
        (reply,) = likely
        if reply.code >= 400:
            self._memory.forget(self._sender, reply.digest, [recipient])
        return _received(reply)

    # When the content is known

    async def begin(self, recipients: Iterable[str], *, alone: bool) -> dict[str, ReceivedReply] | None:
        """Begin to deliver the message. Returns the replies that these recipients have; None if a delivery is in progress
        already.

        ``alone`` keeps a second delivery from beginning until ``end()``. It is for several recipients: one reply cannot differ.
        """
        self._digest = self.hash.digest()
        if not await self._memory.claim(self._digest, alone):
            return None
        self._locked = alone
        rows = {each.recipient: each for each in await self._memory.of_message(self._sender, self._digest)}
        self._recorded = {each for each in recipients if each in rows}
        return {each: _received(rows[each]) for each in self._recorded}

    def record(self, replies: Mapping[str, ReceivedReply]) -> None:
        """Store the replies received so far, while others are outstanding."""
        if new := {each: reply for each, reply in replies.items() if each not in self._recorded}:
            self._write(new)

    async def keep(self, replies: Mapping[str, ReceivedReply]) -> None:
        """Store all of these for the client's next attempt; returns when they are on disk."""
        if replies:
            await self._memory.result(self._write(replies), None)

    def agree(self, delivered: Mapping[str, ReceivedReply]) -> None:
        """All replies are alike, so the client is about to get one reply for all; ``delivered`` are the positive ones."""
        self._agreed = True
        self._delivered = dict(delivered)

    def end(self, answered: bool) -> None:
        """The client got its reply, so nothing has to be remembered; or it has disconnected, and will send the message again."""
        future: asyncio.Future[None] | None = None
        if answered and self._agreed and self._recorded:
            future = self._memory.forget(self._sender, self._digest, self._recorded)
        elif self._delivered and not answered:
            future = self._write(self._delivered)
        if future is None:
            self._release()
        else:
            future.add_done_callback(lambda future: self._release())

    def _write(self, replies: Mapping[str, ReceivedReply]) -> asyncio.Future[None]:
        self._recorded |= replies.keys()
        rows = [Remembered(each, self._digest, self._attempt, a.code, a.text[:MAX_TEXT_LENGTH]) for each, a in replies.items()]
        return self._memory.record(self._sender, rows)

    def _release(self) -> None:
        if self._locked:
            self._locked = False
            self._memory.release(self._digest)


def attempt_of(session: Session, sender: Address) -> bytes:
    """A hash of what stays the same when a client sends a message again, apart from addresses and content."""
    size, envid = sender.args.get("SIZE"), sender.args.get("ENVID")
    network = block_of(session.remote_address, ipv4=24, ipv6=64) if size is None else ""
    login = "" if session.user is None else str(session.user)
    return blake2b(repr((size, envid, login, network)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _received(remembered: Remembered) -> ReceivedReply:
    return ReceivedReply(remembered.code, tuple(remembered.text.split("\n")))
