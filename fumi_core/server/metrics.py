"""The core's Prometheus metrics. Events that happen for every command are counted in a Tally, and read from it."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from fumi_core.runtime.counting import Counter, Gauge, Histogram, Labels, Tallied
from fumi_core.runtime.journal import journal
from fumi_core.server.observer import DeliveryResult, HeaderResult, Observer, RejectReason
from fumi_core.server.setup import PHASES
from fumi_core.smtp.results import MessageResult
from fumi_core.smtp.session import Session
from fumi_core.smtp.tally import Tally
from fumi_core.version import VERSION

_TLS_VERSIONS = ("unknown", "TLSv1.2", "TLSv1.3", "TLSv1.1", "TLSv1")
_CODES = (
    *("211", "214", "220", "221", "235", "250", "251", "252", "334", "354"),
    *("421", "450", "451", "452", "454", "455"),
    *("500", "501", "502", "503", "504", "521", "530", "535", "538", "550", "551", "552", "553", "554", "555", "other"),
)
_SIZES = (1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class CoreMetrics(Observer):
    """Counts a server's events, in ``registry``; all series exist from the start at 0."""

    def __init__(self, registry: CollectorRegistry, tally: Tally, targets: tuple[str, ...] = ()) -> None:
        """``targets`` are the names of the delivery targets."""

        def counter(name: str, text: str, labels: Labels = ()) -> Counter:
            return Counter(f"fumi_core_{name}", text, labels, registry)

        self._tally = tally
        self._connections = counter("connections", "Connections accepted.").labels()
        self._active = Gauge("fumi_core_connections_active", "Connections open now.", (), registry, over_workers="sum").labels()
        sessions = counter("sessions", "Sessions, by TLS version.", ("secure", "tls_version"))
        self._sessions = {
            **{("true", tls): sessions.labels("true", tls) for tls in _TLS_VERSIONS},
            ("false", "none"): sessions.labels("false", "none"),
        }
        headers = counter("proxy_headers", "PROXY headers expected, by version and result.", ("version", "result"))
        self._headers = {("1", "ok"): headers.labels("1", "ok"), ("2", "ok"): headers.labels("2", "ok")}
        for result in HeaderResult:
            if result is not HeaderResult.OK:
                self._headers["none", result] = headers.labels("none", result)
        Tallied("fumi_core_commands", "Commands received, by verb.", ("command",), registry, self._commands)
        Tallied("fumi_core_replies", "Replies sent, by code.", ("code",), registry, self._replies)
        text = "Authentications, by mechanism and result."
        Tallied("fumi_core_auth", text, ("method", "result"), registry, lambda: list(tally.authentications.items()))
        messages = counter("messages", "Messages, by result.", ("result",))
        self._messages = {result: messages.labels(result) for result in MessageResult}
        sizes = Histogram("fumi_core_message_bytes", "Size of received messages, in bytes.", (), registry, _SIZES)
        seconds = Histogram("fumi_core_data_seconds", "Seconds from DATA to the final reply.", (), registry, _SECONDS)
        self._bytes, self._seconds = sizes.labels(), seconds.labels()
        hooks = Histogram("fumi_core_hook_seconds", "Seconds that a phase's handlers took.", ("phase",), registry, _SECONDS)
        self._hooks = {phase: hooks.labels(phase) for phase in PHASES}
        deliveries = counter("deliveries", "Deliveries, by target and result.", ("target", "result"))
        self._deliveries = {
            (target, result): deliveries.labels(target, result) for target in targets for result in DeliveryResult
        }
        rejected = counter("rejected", "Connections rejected or closed by the server, by reason.", ("reason",))
        self._rejected = {reason: rejected.labels(reason) for reason in RejectReason}
        build = Gauge("fumi_core_build_info", "The running version.", ("version",), registry, over_workers="max")
        build.labels(VERSION).set(1)

    def _commands(self) -> Iterable[tuple[Labels, float]]:
        return [((verb.decode(),), count) for verb, count in list(self._tally.commands.items())]

    def _replies(self) -> Iterable[tuple[Labels, float]]:
        counts = dict.fromkeys(_CODES, 0)
        for code, count in list(self._tally.replies.items()):
            counts[str(code) if str(code) in counts else "other"] += count
        return [((code,), count) for code, count in counts.items()]

    def connection_opened(self) -> None:
        self._connections.inc()
        self._active.inc()

    def connection_closed(self) -> None:
        self._active.dec()

    def session_started(self, session: Session) -> None:
        version = (session.tls.version if session.tls else None) or "unknown"
        known = version if version in _TLS_VERSIONS else "unknown"
        self._sessions["true" if session.secure else "false", known if session.secure else "none"].inc()

    def proxy_header(self, version: str, result: HeaderResult) -> None:
        self._headers[version, result].inc()

    def rejected(self, reason: RejectReason) -> None:
        self._rejected[reason].inc()
        journal.note("rejected", reason=reason)

    def message(self, result: MessageResult, size: int, seconds: float) -> None:
        self._messages[result].inc()
        self._bytes.observe(size)
        self._seconds.observe(seconds)

    def handlers_ended(self, phase: str, seconds: float) -> None:
        self._hooks[phase].observe(seconds)

    def delivery(self, target: str, result: DeliveryResult) -> None:
        self._deliveries[target, result].inc()
