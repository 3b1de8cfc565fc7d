"""The states of a dialogue, and which command may come in which (RFC 5321 §4.1.4): data, for the protocol to look up."""

from __future__ import annotations

from enum import Enum

from fumi_core.smtp import replies
from fumi_core.smtp.replies import Reply


class State(Enum):
    START = "start"  # banner sent, no EHLO yet
    READY = "ready"  # EHLO received, no transaction
    MAIL = "mail"  # MAIL accepted
    RCPT = "rcpt"  # and RCPT accepted
    DATA = "data"  # the message is arriving, after DATA or the last BDAT
    CHUNKS = "chunks"  # the message is arriving; more BDAT will come
    CLOSED = "closed"

    __hash__ = object.__hash__  # they are looked up for every command, and Enum's own is written in Python


# Names of their own: Python takes five times as long to look up an enum's member.
START, READY, MAIL, RCPT, DATA, CHUNKS, CLOSED = State


# The reply to a verb that comes in the wrong state; in every other state it is allowed.
BEFORE_MAIL = {State.START: replies.HELO_FIRST, State.READY: replies.NEED_MAIL, State.MAIL: replies.NEED_RCPT}
_IN_TRANSACTION = dict.fromkeys([State.MAIL, State.RCPT, State.CHUNKS], replies.IN_TRANSACTION)
ORDER: dict[bytes, dict[State, Reply]] = {
    b"AUTH": {State.START: replies.HELO_FIRST, **_IN_TRANSACTION},
    b"MAIL": {
        State.START: replies.HELO_FIRST,
        State.MAIL: replies.NESTED_MAIL,
        State.RCPT: replies.NESTED_MAIL,
        State.CHUNKS: replies.MAIL_AFTER_BDAT,
    },
    b"RCPT": {
        State.START: replies.HELO_FIRST,
        State.READY: replies.NEED_MAIL,
        State.CHUNKS: replies.RCPT_AFTER_BDAT,
    },
    b"DATA": {**BEFORE_MAIL, State.CHUNKS: replies.DATA_AFTER_BDAT},
    b"XCLIENT": _IN_TRANSACTION,
    b"XFORWARD": _IN_TRANSACTION,
}
ALWAYS: dict[State, Reply] = {}
"""For the verbs that are not in the table."""
