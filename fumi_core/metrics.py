"""The core's Prometheus metrics. What is counted for every command is counted in a Tally and carried over at a scrape."""

from __future__ import annotations

import threading
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fumi_core.observer import Observer
from fumi_core.session import Session
from fumi_core.tally import Tally

_TLS_VERSIONS = ("none", "unknown", "TLSv1.2", "TLSv1.3", "TLSv1.1", "TLSv1")
_CODES = (
    *("211", "214", "220", "221", "235", "250", "251", "252", "334", "354"),
    *("421", "450", "451", "452", "454", "455"),
    *("500", "501", "502", "503", "504", "521", "530", "535", "538", "550", "551", "552", "553", "554", "555", "other"),
)
_SIZES = (1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class CoreMetrics(Observer):
    """Counts what a server tells, in ``registry``; all series are there from the start at 0."""

    def __init__(self, registry: CollectorRegistry, tally: Tally, targets: tuple[str, ...] = ()) -> None:
        """``targets`` are the names of the delivery targets."""

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"fumi_core_{name}", text, labels, registry=registry)

        self._tally = tally
        self._carried: dict[object, int] = {}
        self._carrying = threading.Lock()
        self._connections = counter("connections", "Connections accepted.")
        self._active = Gauge("fumi_core_connections_active", "Connections open.", registry=registry)
        sessions = counter("sessions", "Sessions, by whether and how the client came over TLS.", ("secure", "tls_version"))
        self._sessions = {
            (secure, tls): sessions.labels(secure, tls)
            for secure in ("true", "false")
            for tls in _TLS_VERSIONS
            if (tls == "none") is (secure == "false")
        }
        headers = counter("proxy_headers", "PROXY headers expected.", ("version", "result"))
        self._headers = {("1", "ok"): headers.labels("1", "ok"), ("2", "ok"): headers.labels("2", "ok")}
        for result in ("malformed", "untrusted", "timeout", "closed"):
            self._headers["none", result] = headers.labels("none", result)
        commands = counter("commands", "Commands received.", ("command",))
        self._commands = {verb: commands.labels(verb.decode()) for verb in tally.commands}
        replies = counter("replies", "Replies sent.", ("code",))
        self._replies = {code: replies.labels(code) for code in _CODES}
        authentications = counter("auth", "Authentications, by mechanism and how they ended.", ("method", "result"))
        self._authentications = {key: authentications.labels(*key) for key in tally.authentications}
        messages = counter("messages", "Messages, by how they ended.", ("result",))
        self._messages = {result: messages.labels(result) for result in ("accepted", "rejected", "deferred", "aborted")}
        self._bytes = Histogram("fumi_core_message_bytes", "Octets of messages, as received.", buckets=_SIZES, registry=registry)
        self._seconds = Histogram(
            "fumi_core_data_seconds", "Seconds from DATA to its final reply.", buckets=_SECONDS, registry=registry
        )
        deliveries = counter("deliveries", "Deliveries, by target and how they ended.", ("target", "result"))
        results = ("ok", "deferred", "failed")
        self._deliveries = {(target, result): deliveries.labels(target, result) for target in targets for result in results}
        rejected = counter("rejected", "Connections turned away or cut.", ("reason",))
        reasons = ("max_clients", "not_smtp", "errors", "timeout", "draining")
        self._rejected = {reason: rejected.labels(reason) for reason in reasons}
        counter("worker_restarts", "Workers that died and were replaced.")
        Gauge("fumi_core_build_info", "The running version.", ("version",), registry=registry).labels(version("fumi")).set(1)

    def refresh(self) -> None:
        """Carry the tally over; from any thread."""
        with self._carrying:
            for verb, count in list(self._tally.commands.items()):
                self._carry(verb, self._commands[verb], count)
            for key, count in list(self._tally.authentications.items()):
                self._carry(key, self._authentications[key], count)
            for code, count in list(self._tally.replies.items()):
                self._carry(code, self._replies.get(str(code), self._replies["other"]), count)

    def _carry(self, key: object, child: Counter, count: int) -> None:
        child.inc(count - self._carried.get(key, 0))
        self._carried[key] = count

    def connection_opened(self) -> None:
        self._connections.inc()
        self._active.inc()

    def connection_closed(self) -> None:
        self._active.dec()

    def session_started(self, session: Session) -> None:
        version = (session.tls.version if session.tls else None) or "unknown"
        known = version if version in _TLS_VERSIONS else "unknown"
        self._sessions["true" if session.secure else "false", known if session.secure else "none"].inc()

    def proxy_header(self, version: str, result: str) -> None:
        self._headers[version, result].inc()

    def rejected(self, reason: str) -> None:
        self._rejected[reason].inc()

    def message(self, result: str, size: int, seconds: float) -> None:
        self._messages[result].inc()
        self._bytes.observe(size)
        self._seconds.observe(seconds)

    def delivery(self, target: str, result: str) -> None:
        self._deliveries[target, result].inc()
