"""The edge's metrics, with the prefix fumi_edge_.

All label values are known, and their series exist at 0, before the first client connects: no client input becomes a label.
Series are looked up once. The tunnel counts in plain integers, which ``EdgeMetrics.moved`` adds up every few seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry

from fumi_core.proxy_protocol import TLSInfo
from fumi_core.runtime.counting import Count, Counter, Gauge, Histogram, Level, Limit
from fumi_edge.tls.handshake import HandshakeResult

TLS_VERSIONS = ("TLSv1.2", "TLSv1.3")

_HANDSHAKE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_CONNECT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SESSION_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)


class StarttlsResult(StrEnum):
    """The outcome of a connection to a STARTTLS port."""

    UPGRADED = "upgraded"
    PLAINTEXT = "plaintext"
    REFUSED = "refused"
    """None of the others, for example because the client did not upgrade although it must."""
    INJECTION = "injection"


class BackendError(StrEnum):
    """Why a connection to a backend or a health check failed."""

    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    RESOLVE = "resolve"
    BANNER = "banner"
    CERTIFICATE = "certificate"
    """A certificate was rejected or missing: the backend's was rejected by the edge, or the edge's by the backend."""
    TLS = "tls"
    """TLS with the backend failed, or ended without close_notify."""
    OTHER = "other"


class RejectReason(StrEnum):
    """Why a client was rejected."""

    MAX_CLIENTS = "max_clients"
    MAX_CLIENTS_PER_IP = "max_clients_per_ip"
    RATE = "rate"
    UNTRUSTED = "untrusted"
    PROXY_HEADER = "proxy_header"
    INJECTION = "injection"
    NOT_SMTP = "not_smtp"
    ERRORS = "errors"


class ReloadResult(StrEnum):
    OK = "ok"
    DEFERRED = "deferred"
    FAILED = "failed"


class ListenerMetrics:
    """The series of one listener."""

    __slots__ = ("active", "connections", "handshakes")

    def __init__(self, connections: Counter, active: Gauge, handshakes: Counter, name: str) -> None:
        self.connections = connections.labels(name)
        self.active = active.labels(name)
        self.handshakes = {result: handshakes.labels(name, result) for result in HandshakeResult}


class BackendMetrics:
    """The series of one backend."""

    __slots__ = ("connect_seconds", "errors", "up")

    def __init__(self, seconds: Histogram, errors: Counter, up: Gauge, name: str) -> None:
        self.connect_seconds = seconds.labels(name)
        self.errors = {reason: errors.labels(name, reason) for reason in BackendError}
        self.up = up.labels(name)


class EdgeMetrics:
    """All metrics, in ``registry``. ``ciphers`` are the (TLS version, cipher) pairs that can be negotiated."""

    def __init__(self, registry: CollectorRegistry, ciphers: Sequence[tuple[str, str]], version: str) -> None:
        self._registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fumi_edge_{name}", text, labels, registry)

        def state(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fumi_edge_{name}", text, labels, registry, over_workers="max")

        def histogram(name: str, text: str, bounds: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"fumi_edge_{name}", text, labels, registry, bounds)

        self._connections = counter("connections", "Client connections accepted.", "listener")
        active = "Client connections open now."
        self._active = Gauge("fumi_edge_connections_active", active, ("listener",), registry, over_workers="sum")
        self._handshakes = counter("handshakes", "TLS handshakes, by result.", "listener", "result")
        self.handshake_seconds = histogram(
            "handshake_seconds", "Duration of successful TLS handshakes, in seconds.", _HANDSHAKE_SECONDS
        ).labels()
        self._tls_sessions = counter(
            "tls_sessions", "TLS sessions, by version, cipher and resumption.", "version", "cipher", "resumed"
        )
        starttls = counter("starttls", "Connections to STARTTLS ports, by outcome.", "result")
        moved = counter("bytes", "Traffic in bytes: in from clients, out to clients.", "direction")
        self._connect_seconds = histogram(
            "backend_connect_seconds", "Time to connect to a backend, in seconds.", _CONNECT_SECONDS, "backend"
        )
        self._backend_errors = counter(
            "backend_errors", "Failed connections to a backend and failed health checks, by reason.", "backend", "reason"
        )
        self._backend_up = state("backend_up", "1 while the backend is up.", "backend")
        rejected = counter("rejected", "Rejected connections, by reason.", "reason")
        self._not_after = state(
            "certificate_not_after_timestamp_seconds", "Expiry of the certificate, in seconds since 1970.", "name"
        )
        reloads = counter(
            "certificate_reloads", "Certificate reloads: ok, deferred (will retry), or failed (some files).", "result"
        )
        self.session_seconds = histogram(
            "session_seconds", "Duration of client connections, in seconds.", _SESSION_SECONDS
        ).labels()
        state("build_info", "Always 1; the label is the running version.", "version").labels(version).set(1)

        self._sessions: dict[tuple[str, str, bool], Count] = {}
        self.ciphers([*ciphers, *((each, "unknown") for each in TLS_VERSIONS)])
        self.starttls = {result: starttls.labels(result) for result in StarttlsResult}
        self.rejected = {reason: rejected.labels(reason) for reason in RejectReason}
        self.certificate_reloads = {result: reloads.labels(result) for result in ReloadResult}
        self._expiries: dict[object, list[tuple[str, float]]] = {}
        self._certificate_names: set[str] = set()
        self._bytes_in, self._bytes_out = moved.labels("in"), moved.labels("out")

    def listener(self, name: str) -> ListenerMetrics:
        return ListenerMetrics(self._connections, self._active, self._handshakes, name)

    def backend(self, name: str) -> BackendMetrics:
        return BackendMetrics(self._connect_seconds, self._backend_errors, self._backend_up, name)

    def backend_connections(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Export the open connections of each backend, by its name, as ``count`` returns them."""
        text = "Connections to the backend: open, or being opened."
        name = "fumi_edge_backend_connections_active"
        Level(name, text, ("backend",), self._registry, lambda: [((each,), open_now) for each, open_now in count().items()])

    def connections_limit(self, limits: Callable[[], tuple[float, float]]) -> None:
        """Export the limits of this worker's clients and of all workers' clients, as ``limits`` returns them."""
        text = "Connections that --max-clients and the descriptors allow; +Inf without a limit."
        Limit("fumi_edge_connections_limit", text, self._registry, limits)

    def ciphers(self, ciphers: Iterable[tuple[str, str]]) -> None:
        """Add the series of these (TLS version, cipher) pairs, which can be negotiated from now on."""
        for tls, cipher in ciphers:
            for resumed in (False, True):
                self._sessions[tls, cipher, resumed] = self._tls_sessions.labels(tls, cipher, "true" if resumed else "false")

    def drop_backend(self, name: str) -> None:
        """Remove the state of a backend that is no longer configured; counters stay."""
        self._backend_up.remove(name)

    def certificates(self, expiries: Iterable[tuple[str, float]], owner: object = None) -> None:
        """Publish exactly these (name, seconds since 1970) of the owner; of several with one name, the one that expires first."""
        self._expiries.pop(owner, None)
        if published := list(expiries):
            self._expiries[owner] = published
        earliest: dict[str, float] = {}
        for name, not_after in itertools.chain(*self._expiries.values()):
            earliest[name] = min(not_after, earliest.get(name, not_after))
        for name, not_after in earliest.items():
            self._not_after.labels(name).set(not_after)
        for name in self._certificate_names - set(earliest):
            self._not_after.remove(name)
        self._certificate_names = set(earliest)

    def tls_session(self, tls: TLSInfo, resumed: bool) -> None:
        version = tls.version if tls.version in TLS_VERSIONS else TLS_VERSIONS[-1]
        child = self._sessions.get((version, tls.cipher or "", resumed)) or self._sessions[version, "unknown", resumed]
        child.inc()

    def moved(self, received: int, sent: int) -> None:
        """Add bytes from clients and bytes to clients."""
        if received:
            self._bytes_in.inc(received)
        if sent:
            self._bytes_out.inc(sent)
