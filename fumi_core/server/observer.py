"""What a server reports of itself while it works. The default ignores it; ``fumi_core.server.metrics`` counts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fumi_core.runtime.logs import failure
from fumi_core.smtp.session import Session

_log = logging.getLogger("fumi.core")


class Observer:
    """Each method is called once per event it is named after. What one raises is logged and changes nothing."""

    def connection_opened(self) -> None:
        """A client connected."""

    def connection_closed(self) -> None:
        """Its connection is gone."""

    def session_started(self, session: Session) -> None:
        """It is known who the client is and how it came."""

    def proxy_header(self, version: str, result: str) -> None:
        """A PROXY header came (version "1" or "2") or did not ("none"); result: ok malformed untrusted timeout closed."""

    def rejected(self, reason: str) -> None:
        """A connection was rejected or closed by the server: max_clients, not_smtp, draining, errors, timeout."""

    def message(self, result: str, size: int, seconds: float) -> None:
        """A message ended: accepted rejected deferred aborted, after so many octets and seconds."""

    def delivery(self, target: str, result: str) -> None:
        """A delivery ended: ok deferred failed."""


class GuardedObserver(Observer):
    """Calls an observer, and logs what it raises: metrics that fail neither lose a reply nor deliver a message twice."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        for name in _EVENTS:
            setattr(self, name, _guarded(name, getattr(observer, name)))

    def __getattr__(self, name: str) -> Any:
        """What else the observer has."""
        return getattr(self._observer, name)


def guarded(observer: Observer) -> Observer:
    """The observer as one whose methods do not raise."""
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
