"""The events that a server reports. The default ignores them; ``fumi_core.server.metrics`` counts them.

Each costs a call or two, so what happens for every command is not among them: ``fumi_core.smtp.tally`` counts that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from fumi_core.errors import SMTPError
from fumi_core.runtime.logs import failure
from fumi_core.smtp.results import MessageResult
from fumi_core.smtp.session import Session

_log = logging.getLogger("fumi.core")


class HeaderResult(StrEnum):
    """The result of waiting for a PROXY header."""

    OK = "ok"
    MALFORMED = "malformed"
    UNTRUSTED = "untrusted"
    TIMEOUT = "timeout"
    CLOSED = "closed"


class RejectReason(StrEnum):
    """Why the server rejected or closed a connection."""

    MAX_CLIENTS = "max_clients"
    NOT_SMTP = "not_smtp"
    ERRORS = "errors"
    TIMEOUT = "timeout"
    DRAINING = "draining"


class DeliveryResult(StrEnum):
    OK = "ok"
    DEFERRED = "deferred"
    FAILED = "failed"

    @classmethod
    def of(cls, error: BaseException | None) -> DeliveryResult:
        """The result of a delivery that raised ``error``, or None; only an SMTPError with a 5xx code is final."""
        if error is None:
            return cls.OK
        return cls.FAILED if isinstance(error, SMTPError) and error.code >= 500 else cls.DEFERRED


class Observer:
    """Each method is called once for each event. An exception from it is logged and changes nothing."""

    def connection_opened(self) -> None:
        """A client connected."""

    def connection_closed(self) -> None:
        """A connection has ended."""

    def session_started(self, session: Session) -> None:
        """The client's address is known, and whether it uses TLS."""

    def proxy_header(self, version: str, result: HeaderResult) -> None:
        """A PROXY header (version "1" or "2") arrived, or did not ("none")."""

    def rejected(self, reason: RejectReason) -> None:
        """A connection was rejected or closed by the server."""

    def message(self, result: MessageResult, size: int, seconds: float) -> None:
        """A message ended, with its size in bytes, and its duration in seconds from DATA to the final reply."""

    def handlers_ended(self, phase: str, seconds: float) -> None:
        """The handlers of a phase, such as "data", have run. ``seconds`` include what they waited for."""

    def delivery(self, target: str, result: DeliveryResult) -> None:
        """A delivery ended. ``target`` is the delivery target's name."""


class GuardedObserver(Observer):
    """Calls an observer, and logs exceptions: failing metrics neither lose a reply nor deliver a message twice."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        for name in _EVENTS:
            setattr(self, name, _guarded(name, getattr(observer, name)))

    def __getattr__(self, name: str) -> Any:
        """The observer's other attributes."""
        return getattr(self._observer, name)


def guarded(observer: Observer) -> Observer:
    """Wrap the observer so that its methods do not raise."""
    return observer if type(observer) is Observer or isinstance(observer, GuardedObserver) else GuardedObserver(observer)


def _guarded(name: str, method: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        try:
            method(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failure(_log, "observer failed", error, method=name)

    return call


_EVENTS = tuple(name for name, value in vars(Observer).items() if callable(value) and not name.startswith("_"))
