"""What a server tells of itself while it works. The default hears nothing; ``fumi_core.metrics`` counts."""

from __future__ import annotations

from fumi_core.session import Session


class Observer:
    """Each method is called once per event it is named after; none may raise."""

    def connection_opened(self) -> None:
        """A client connected."""

    def connection_closed(self) -> None:
        """Its connection is gone."""

    def session_started(self, session: Session) -> None:
        """It is known who the client is and how it came."""

    def proxy_header(self, version: str, result: str) -> None:
        """A PROXY header came (version "1" or "2") or did not ("none"); result: ok malformed untrusted timeout closed."""

    def rejected(self, reason: str) -> None:
        """A connection was turned away: max_clients, untrusted, not_smtp, draining, errors, timeout."""

    def message(self, result: str, size: int, seconds: float) -> None:
        """A message ended: accepted rejected deferred aborted, after so many octets and seconds."""

    def delivery(self, target: str, result: str) -> None:
        """A delivery ended: ok deferred failed."""
