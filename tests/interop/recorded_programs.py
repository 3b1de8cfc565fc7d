"""The programs whose series are recorded for ops/prometheus/rules_test.yml, and what their clients do."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.interop import alert_clients as clients
from tests.interop.fleet import Fleet, Program
from tests.support import proc
from tests.support.programs import Programs

PORT_NAMES: dict[int, str] = {}
"""What a port of 127.0.0.1 is called in the file."""
Series = dict[str, float]
Step = tuple[str, tuple[Callable[[], Series], Callable[[], object], str]]
"""A recording's name; what reads the series, what the clients do, and a part of the name of a series that it moves."""
UNKNOWN = ("EHLO client.example", "MAIL FROM:<a@example.com>", "RCPT TO:<b@elsewhere.example>", "QUIT")
NO_CHECKS = ("--health-interval", "3600")


def step(name: str, program: Program, dialogue: Callable[[], object], sign: str = "") -> Step:
    return name, (program.series, dialogue, sign)


def nothing() -> None:
    """The program is as it is."""


def kill_a_worker(program: Program) -> None:
    """Of a program that has answered: the workers are its first children, and the process that answers is the last."""
    os.kill(proc.children(program.process.pid)[0], signal.SIGKILL)


class RecordedPrograms:
    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._fleet = Fleet(programs)
        self._held: list[socket.socket] = []
        fleet = self._fleet
        self._core = fleet.core(
            *("core", "--domain", "example.org", "--users", fleet.users(), "--allow-insecure-auth", "--deliver", "discard:")
        )

    def steps(self) -> Iterator[Step]:
        """All of them, in their order: some change the programs."""
        yield from self._of_a_core()
        yield from self._of_apps_that_raise()
        yield from self._of_a_next_hop()
        yield from self._of_an_edge()
        yield from self._of_limits()
        yield from self._of_backends()
        yield from self._of_certificates()
        yield from self._of_workers()

    def _of_a_core(self) -> Iterator[Step]:
        core, port = self._core, self._core.port
        quit_ = 'replies_total{code="221"}'
        yield step("accepted", core, lambda: clients.to_core(port, *clients.mail("b@example.org")), quit_)
        yield step("unknown recipient", core, lambda: clients.to_core(port, *UNKNOWN), quit_)
        yield step("right password", core, lambda: clients.to_core(port, *clients.login("secret")), quit_)
        yield step("wrong password", core, lambda: clients.to_core(port, *clients.login("wrong")), quit_)
        yield step("wrong password by LOGIN", core, lambda: clients.to_core(port, *clients.login("wrong", "LOGIN")), quit_)
        yield step("check", core, self._start_edge, "proxy_headers_total")
        yield step("silent check", core, lambda: clients.vanish(port), "proxy_headers_total")
        yield step(
            "no PROXY header", core, lambda: clients.to_core(port, header=b"EHLO client.example\r\n"), "proxy_headers_total"
        )

    def _start_edge(self) -> None:
        """The edge of the next recordings, whose first check is one, and the only one."""
        self._edge = self._fleet.edge("edge", [self._core.port], *NO_CHECKS, "--handshake-timeout", "0.5")
        PORT_NAMES.update({self._edge.port: ":25", self._edge.tls: ":465"})

    def _of_apps_that_raise(self) -> Iterator[Step]:
        for phase in ("connect", "mail_from"):
            self._fleet.raising_app(phase)
        connect, mail = (self._fleet.core(each, f"{each}:app") for each in ("connect", "mail_from"))
        group = "MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA"
        quit_ = 'replies_total{code="221"}'
        yield step("raised at connect", connect, lambda: clients.to_core(connect.port, header=b""), 'replies_total{code="4')
        yield step("raised at MAIL", mail, lambda: clients.to_core(mail.port, *clients.mail("b@example.org"), header=b""), quit_)
        many = lambda: clients.to_core(mail.port, "EHLO client.example", group, header=b"")  # noqa: E731
        yield step("raised in a group", mail, many, 'replies_total{code="503"}')

    def _of_a_next_hop(self) -> Iterator[Step]:
        hop = self._fleet.core(*("hop", "--lmtp", "--domain", "example.org", "--deliver", "discard:", "--proxy-protocol", "off"))
        core = self._fleet.core("lmtp", "--deliver", f"lmtp:127.0.0.1:{hop.port}")
        sign = "deliveries_total"
        message, other = clients.mail("b@example.org"), clients.mail("b@elsewhere.example")
        yield step("delivered", core, lambda: clients.to_core(core.port, *message), sign)
        yield step("rejected by the next hop", core, lambda: clients.to_core(core.port, *other), "replies_total")
        self._programs.stop(hop.process, signal.SIGKILL)
        yield step("deferred", core, lambda: clients.to_core(core.port, *message), sign)

    def _of_an_edge(self) -> Iterator[Step]:
        edge, tls = self._edge, self._edge.tls
        shakes = "handshakes_total"
        yield step("tls", edge, lambda: clients.over_tls(tls, "QUIT"), shakes)
        yield step("distrusting", edge, lambda: clients.distrust(tls), shakes)
        yield step("scanner", edge, lambda: clients.scan(tls), shakes)
        yield step("reset", edge, lambda: clients.reset(tls), shakes)
        yield step("stalled", edge, lambda: clients.stall(tls), shakes)
        yield step("upgraded", edge, lambda: clients.over_starttls(edge.port, "QUIT"), "starttls_total")
        yield step("injection", edge, lambda: clients.inject(edge.port), "starttls_total")

    def _of_limits(self) -> Iterator[Step]:
        behind, rejected, active = [self._core.port], "rejected_total", "connections_active{"
        full = self._fleet.edge("full", behind, *NO_CHECKS, "--max-clients", "10")
        PORT_NAMES.update({full.port: ":25", full.tls: ":465"})
        self._hold(full.port, 7)
        yield step("8 clients", full, lambda: self._hold(full.tls, 1), active)
        yield step("9 clients", full, lambda: self._hold(full.tls, 1), active)
        self._hold(full.port, 1)
        yield step("one client too many", full, lambda: clients.scan(full.port), rejected)
        core = self._fleet.core("full-core", "--deliver", "discard:", "--proxy-protocol", "off", "--max-clients", "1")
        self._hold(core.port, 1)
        yield step("one client too many for the core", core, lambda: clients.to_core(core.port, header=b""), rejected)
        quick = self._fleet.edge("quick", behind, *NO_CHECKS, "--rate-per-ip", "1/h")
        clients.scan(quick.tls)
        yield step("too quick a client", quick, lambda: clients.scan(quick.tls), rejected)
        flags = ("--accept-proxy", "--trusted-proxy", "192.0.2.1")
        bypassed = self._fleet.edge("bypassed", behind, *NO_CHECKS, *flags)
        yield step("untrusted load balancer", bypassed, lambda: clients.scan(bypassed.tls), rejected)
        narrow = self._fleet.edge("narrow", behind, *NO_CHECKS, before=("prlimit", "--nofile=128:128"))
        yield step("few descriptors", narrow, nothing)
        most = int(narrow.series()["fumi_edge_connections_limit"])
        yield step("many descriptors", narrow, lambda: self._hold(narrow.port, most))

    def _hold(self, port: int, count: int) -> None:
        """Clients that stay; each has its banner, but on a port for TLS."""
        for _ in range(count):
            self._held.append(socket.create_connection(("127.0.0.1", port), 60))
            if PORT_NAMES.get(port) != ":465":
                self._held[-1].recv(4096)

    def _of_backends(self) -> Iterator[Step]:
        first, second = (self._fleet.core(name, "--deliver", "discard:") for name in ("first", "second"))
        PORT_NAMES.update({first.port: "core1:2525", second.port: "core2:2525"})
        edge = self._fleet.edge("both", [first.port, second.port], "--health-interval", "0.2")
        yield step("both up", edge, nothing)
        yield step("one down", edge, lambda: self._programs.stop(first.process, signal.SIGKILL), "backend_up")
        yield step("both down", edge, lambda: self._programs.stop(second.process, signal.SIGKILL), "backend_up")

    def _of_certificates(self) -> Iterator[Step]:
        behind, names = [self._core.port], {"fresh": 15, "ageing": 10, "old": 2}
        files = {name: str(self._fleet.certificate(name, days)) for name, days in names.items()}
        edge = self._fleet.edge("expiring", behind, *NO_CHECKS, *(word for each in files.values() for word in ("--cert", each)))
        yield "certificates", (lambda: _since(edge, 0), nothing, "")
        edge = self._fleet.edge("expired", behind, *NO_CHECKS, "--cert", files["old"])
        yield "certificates, three days later", (lambda: _since(edge, 3), nothing, "")
        file = Path(self._fleet.directory / "renewed.pem")
        file.write_bytes(self._fleet.good.read_bytes())
        renewing = self._fleet.edge("renewing", behind, *NO_CHECKS, "--cert", str(file), "--cert-reload-interval", "0")

        def renew(text: bytes) -> None:
            file.write_bytes(text)
            renewing.process.send_signal(signal.SIGHUP)

        yield step("good reload", renewing, lambda: renew(Path(files["fresh"]).read_bytes()), 'reloads_total{result="ok"}')
        yield step("failed reload", renewing, lambda: renew(b"garbage\n"), 'reloads_total{result="failed"}')

    def _of_workers(self) -> Iterator[Step]:
        edge = self._fleet.edge("forking-edge", [self._core.port], *NO_CHECKS, "--workers", "2")
        core = self._fleet.core("forking-core", "--deliver", "discard:", "--workers", "2")
        yield step("edge's worker dies", edge, lambda: kill_a_worker(edge), "worker_restarts_total")
        yield step("core's worker dies", core, lambda: kill_a_worker(core), "worker_restarts_total")


def _since(edge: Program, days: int) -> Series:
    """An edge's series so many days from now, and its clock at 0 then, as promtool's: expiries are rounded to hours."""
    now = time.time() + days * 86400
    expiry = "fumi_edge_certificate_not_after_timestamp_seconds"
    return {
        name: round((value - now) / 3600) * 3600 if name.startswith(expiry) else value for name, value in edge.series().items()
    }
