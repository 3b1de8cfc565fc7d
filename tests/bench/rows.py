"""The rows of the table: what is done, by whom, and the ratio to reach. To add one is to add it here."""

from dataclasses import dataclass

from .contestants import (
    Contestant,
    aiosmtpd,
    all_in_one,
    fumi_both,
    fumi_core,
    fumi_core_with_milter,
    fumi_edge,
    haproxy,
    smtp_server,
    smtp_sink,
    stunnel,
)
from .loads import client, smtp_source
from .measures import ClockPerUnit, CpuPerUnit, Growth, Measure, MemoryPerConnection, Silent

# Two descriptors a session in the edge, and some for the rest.
DESCRIPTORS = 20_000
IDLE_SESSIONS = DESCRIPTORS // 2 - 100


@dataclass(frozen=True)
class Peer:
    """A contestant that Fumi is compared to, and how large Fumi's figure may be as a ratio to its; None is no target."""

    contestant: Contestant
    at_most: float | None = None


@dataclass(frozen=True)
class Row:
    """A piece of work for all contestants. Without peers, Fumi's figure itself may be `at_most` so large."""

    name: str
    work: str
    unit: str
    measure: Measure
    ours: Contestant
    peers: tuple[Peer, ...] = ()
    at_most: float | None = None
    rounds: int | None = None
    on_request: bool = False
    """Whether it takes so long that it is done only when it is named."""

    def contestants(self) -> tuple[Contestant, ...]:
        """Ours first."""
        return (self.ours, *(peer.contestant for peer in self.peers))


CORE = Contestant("fumi-core", fumi_core("--deliver", "discard:"))
ONE_WORKER = Contestant("1 worker", fumi_core("tests.bench.busy_handler:app"))
TWO_WORKERS = Contestant("2 workers", fumi_core("tests.bench.busy_handler:app", "--workers", "2"))
CORE_WITH_HOOKS = Contestant("fumi-core", fumi_core("tests.bench.noop_hooks:app"))
CORE_WITH_MILTER = Contestant("with a milter", fumi_core_with_milter)
EDGE_AND_CORE = Contestant("edge + core", fumi_both)
ALL_IN_ONE = Contestant("all-in-one", all_in_one)
AIOSMTPD = Contestant("aiosmtpd", aiosmtpd())
AIOSMTPD_TLS = Contestant("aiosmtpd", aiosmtpd(tls=True))
SMTP_SERVER = Contestant("smtp-server", smtp_server())
SMTP_SERVER_TLS = Contestant("smtp-server", smtp_server(tls=True))
SMTP_SINK = Contestant("smtp-sink", smtp_sink)
HAPROXY_HOLDING = Contestant("haproxy", haproxy("hold"))

KEPT = CpuPerUnit(smtp_source(sessions=10, kept=True), units=3_000, units_of_warm_up=3_000)
# The server has to be the slower end by far: smtp-source takes a tenth of what that handler does.
KEPT_BY_THE_CLOCK = ClockPerUnit(smtp_source(sessions=10, kept=True), units=1_500, units_of_warm_up=500)
# smtp-server lets every client wait 100 ms for its banner, to catch those that talk early: many at a time, or it takes minutes.
CONNECTING = CpuPerUnit(smtp_source(sessions=50, kept=False), units=500, units_of_warm_up=500)
LARGE = CpuPerUnit(client("messages", "--sessions", "2", "--size", "5000000"), units=4, units_of_warm_up=2)
HANDSHAKES = CpuPerUnit(client("handshakes", "--sessions", "8"), units=400, units_of_warm_up=160)
UPLOAD = CpuPerUnit(client("transfer", "--direction", "up"), units=96, units_of_warm_up=32)
DOWNLOAD = CpuPerUnit(client("transfer", "--direction", "down"), units=96, units_of_warm_up=32)
TLS_MESSAGES = CpuPerUnit(client("messages", "--tls", "--sessions", "10"), units=1_000, units_of_warm_up=500)
TLS_CONNECTING = CpuPerUnit(
    client("messages", "--tls", "--sessions", "20", "--connections", "400"), units=400, units_of_warm_up=400
)
TLS_LARGE = CpuPerUnit(client("messages", "--tls", "--sessions", "2", "--size", "5000000"), units=4, units_of_warm_up=2)
MEMORY = MemoryPerConnection(connections=1_000, before=100)


def all_in_one_row(name: str, work: str, unit: str, measure: Measure, *peers: Peer) -> Row:
    """A row of `fumi_edge.Fumi`, TLS and SMTP in one process, against others that are one process too."""
    return Row(f"all-in-one-{name}", work, unit, measure, ALL_IN_ONE, peers)


def edge_row(name: str, work: str, unit: str, measure: Measure, talk: str, of_haproxy: float, of_stunnel: float | None) -> Row:
    """A row of the edge against HAProxy and stunnel, each in front of the same backend."""
    peers = (Peer(Contestant("haproxy", haproxy(talk)), of_haproxy), Peer(Contestant("stunnel", stunnel(talk)), of_stunnel))
    return Row(name, work, unit, measure, Contestant("fumi-edge", fumi_edge(talk)), peers)


def tls_backend_row(direction: str, word: str, measure: Measure) -> Row:
    """A row of bytes through TLS on both sides. stunnel has TLS on one side only, and HAProxy sends its header before TLS."""
    work = f"bytes {word} a backend over TLS through one connection, all arriving"
    ours = Contestant("fumi-edge", fumi_edge("transfer", tls_backend=True))
    peer = Peer(Contestant("haproxy", haproxy("transfer", tls_backend=True)), 1.15)
    return Row(f"edge-bytes-tls-backend-{direction}", work, "µs a MiB", measure, ours, (peer,))


SOAK_MESSAGES, SOAK_SLICE = 1_000_000, 10_000
SOAKING = client("messages", "--sessions", "10", "--connections", str(SOAK_SLICE // 100))


def soak(messages: int) -> Row:
    """The row `soak`, with so many messages, 100 a connection."""
    work = f"growth over {messages:,} messages of 1 KiB on {messages // 100:,} connections, from the first {SOAK_SLICE:,} on"
    measure = Growth(SOAKING, messages, SOAK_SLICE)
    return Row("soak", work, "KiB", measure, CORE, at_most=5 * 1024, rounds=1, on_request=True)


ROWS = (
    Row(
        "core-kept",
        "1 KiB messages on kept connections",
        "µs a message",
        KEPT,
        CORE,
        (Peer(AIOSMTPD, 0.30), Peer(SMTP_SERVER, 1.0), Peer(SMTP_SINK)),
    ),
    Row(
        "core-connect",
        "one message of 1 KiB a connection",
        "µs a message",
        CONNECTING,
        CORE,
        (Peer(AIOSMTPD, 0.38), Peer(SMTP_SERVER, 0.55), Peer(SMTP_SINK)),
    ),
    Row(
        "core-large",
        "messages of 5 MB",
        "µs a message",
        LARGE,
        CORE,
        (Peer(AIOSMTPD, 0.05), Peer(SMTP_SERVER, 0.5), Peer(SMTP_SINK)),
    ),
    Row(
        "core-hooks",
        "core-kept with six async no-op hooks in Fumi, none in aiosmtpd",
        "µs a message",
        KEPT,
        CORE_WITH_HOOKS,
        (Peer(AIOSMTPD, 0.32),),
    ),
    Row(
        "core-milter",
        "core-kept with a mail filter that says continue at once to every step, its own CPU apart",
        "µs a message",
        KEPT,
        CORE_WITH_MILTER,
        (Peer(CORE),),
    ),
    Row(
        "core-workers",
        "1 KiB messages on kept connections to a handler that computes, by the clock: two workers against one",
        "µs a message, clock",
        KEPT_BY_THE_CLOCK,
        TWO_WORKERS,
        (Peer(ONE_WORKER, 0.59),),
    ),
    edge_row(
        "edge-handshake",
        "full TLS 1.3 handshake, PROXY header delivered, banner and EOF read",
        "µs a connection",
        HANDSHAKES,
        "greet",
        of_haproxy=1.25,
        of_stunnel=0.95,
    ),
    edge_row(
        "edge-bytes-up",
        "bytes to the backend through one connection, all arriving",
        "µs a MiB",
        UPLOAD,
        "transfer",
        of_haproxy=1.1,
        of_stunnel=1.0,
    ),
    edge_row(
        "edge-bytes-down",
        "bytes from the backend through one connection, all arriving",
        "µs a MiB",
        DOWNLOAD,
        "transfer",
        of_haproxy=1.1,
        of_stunnel=1.0,
    ),
    tls_backend_row("up", "to", UPLOAD),
    tls_backend_row("down", "from", DOWNLOAD),
    edge_row(
        "edge-memory",
        "memory of an idle TLS connection",
        "KiB a connection",
        MEMORY,
        "hold",
        of_haproxy=1.05,
        of_stunnel=None,
    ),
    Row(
        "tls-session",
        "a TLS session's messages of 1 KiB, edge and core together",
        "µs a message",
        TLS_MESSAGES,
        EDGE_AND_CORE,
        (Peer(AIOSMTPD_TLS, 0.5),),
    ),
    all_in_one_row(
        "kept",
        "1 KiB messages on kept TLS connections, one process",
        "µs a message",
        TLS_MESSAGES,
        Peer(SMTP_SERVER_TLS, 1.0),
        Peer(AIOSMTPD_TLS, 0.36),
    ),
    all_in_one_row(
        "connect",
        "one TLS connection and message of 1 KiB, one process",
        "µs a message",
        TLS_CONNECTING,
        Peer(SMTP_SERVER_TLS, 0.55),
        Peer(AIOSMTPD_TLS),
    ),
    all_in_one_row(
        "large",
        "messages of 5 MB over TLS, one process",
        "µs a message",
        TLS_LARGE,
        Peer(SMTP_SERVER_TLS, 0.7),
        Peer(AIOSMTPD_TLS),
    ),
    all_in_one_row(
        "memory",
        "memory of an idle TLS session, one process",
        "KiB a session",
        MEMORY,
        Peer(HAPROXY_HOLDING, 1.1),
        Peer(SMTP_SERVER_TLS),
        Peer(AIOSMTPD_TLS),
    ),
    Row(
        "tls-idle",
        f"{IDLE_SESSIONS} idle TLS sessions through edge and core, then a message on each",
        "silent sessions",
        Silent(IDLE_SESSIONS),
        EDGE_AND_CORE,
        at_most=0,
        rounds=1,
    ),
    soak(SOAK_MESSAGES),
)
