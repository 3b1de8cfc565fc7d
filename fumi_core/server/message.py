"""A message that is arriving: its progress, that of its handlers, and the replies that follow from both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum

from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.stream import MessageStream
from fumi_core.server.handler_replies import acceptance, rejection
from fumi_core.smtp import replies
from fumi_core.smtp.replies import Reply
from fumi_core.smtp.session import Address, Session


class Reception(Enum):
    """How much of the message there is."""

    ARRIVING = "arriving"
    COMPLETE = "complete"
    ABORTED = "aborted"  # the rest will never arrive


class Stage(Enum):
    """The progress of the message's handlers."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


# Names of their own: Python takes five times as long to look up an enum's member.
ARRIVING, COMPLETE, ABORTED = Reception
WAITING, RUNNING, DONE = Stage


class ArrivingMessage:
    """The message of one transaction, and its handlers' result. ``started`` is in seconds, by the monotonic clock.

    ``recipients`` are those that are each owed a reply, in LMTP; None in SMTP, where there is one reply.
    """

    __slots__ = ("_error", "_recipients", "_rejection", "context", "reception", "stage", "started", "stream")

    def __init__(self, session: Session, stream: MessageStream, command: str, recipients: Sequence[Address] | None) -> None:
        self.stream = stream
        self.context = DataContext(session, stream, command, recipients)
        self._recipients = recipients
        self.started = time.monotonic()
        self.reception = ARRIVING
        self.stage = WAITING
        self._error: BaseException | None = None  # raised by the handlers; ``_rejection`` is the reply that it leads to
        self._rejection: Reply | None = None

    def fail(self, error: BaseException) -> None:
        """The handlers, or a function that the stream calls, raised this error."""
        if error is not self._error:
            self._error, self._rejection = error, rejection(self.context, error)

    def cut_off(self) -> None:
        """The handlers ended because the message was aborted, which is no failure of theirs."""
        self._rejection = replies.LOCAL_ERROR

    def rejection_so_far(self) -> Reply | None:
        """The reply to a message that is rejected for all its recipients, whole or not; else None."""
        error = self.stream.refusal
        if error is not None:
            self.fail(error)
        return replies.SIZE_EXCEEDED if self.context.stream.size_exceeded else self._rejection

    def replies(self) -> list[Reply]:
        """The replies to the whole message: one or, in LMTP, one for each recipient."""
        common = self.rejection_so_far() or acceptance(self.context)
        if self._recipients is None:
            return [common]
        return [self._reply_for(each, common) for each in self._recipients]

    def _reply_for(self, recipient: Address, common: Reply) -> Reply:
        error = self.context.rejected.get(recipient.address) if common.code == 250 else None
        return common if error is None else rejection(self.context, error)
