"""How messages and authentications end, as metrics and logs name it."""

from __future__ import annotations

from enum import StrEnum


class MessageResult(StrEnum):
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    DEFERRED = "deferred"
    ABORTED = "aborted"
    """The client disconnected, or gave the message up, before its end."""


class AuthResult(StrEnum):
    OK = "ok"
    FAILED = "failed"
    ABORTED = "aborted"
    """The client cancelled it, sent a malformed response, or disconnected."""
