"""The events that a server reports. The default ignores them; ``fumi_core.server.metrics`` counts them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fumi_core.runtime.logs import failure
from fumi_core.smtp.session import Session

_log = logging.getLogger("fumi.core")


class Observer:
    """Each method is called once for each event. An exception from it is logged and changes nothing."""

    def connection_opened(self) -> None:
        """A client connected."""

    def connection_closed(self) -> None:
        """A connection has ended."""

    def session_started(self, session: Session) -> None:
        """The client's address is known, and whether it uses TLS."""

    def proxy_header(self, version: str, result: str) -> None:
        """A PROXY header (version "1" or "2") arrived, or did not ("none"); result: ok malformed untrusted timeout closed."""

    def rejected(self, reason: str) -> None:
        """A connection was rejected or closed by the server: max_clients, not_smtp, draining, errors, timeout."""

    def message(self, result: str, size: int, seconds: float) -> None:
        """A message ended: accepted rejected deferred aborted, with its octets and seconds."""

    def delivery(self, target: str, result: str) -> None:
        """A delivery ended: ok deferred failed."""


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
