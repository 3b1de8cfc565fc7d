"""Programs that have the faults that the alerts are for, side by side with a healthy edge and core, and a Prometheus.

``python -m tests.interop.bad_day`` runs it with the rules as they are, which takes 31 minutes, and prints when each alert fired.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.interop import alert_clients as clients
from tests.interop.fleet import Fleet
from tests.support import proc
from tests.support.ports import kept_port
from tests.support.programs import Programs
from tests.support.prometheus import RULES, Prometheus, quicker
from tests.support.waiting import until

HEALTHY = ("healthy-edge", "healthy-core")


@dataclass
class Seen:
    """An alert of one instance: seconds from its fault until Prometheus had it pending, and firing."""

    alert: str
    instance: str
    fault: str
    pending: float | None = None
    firing: float | None = None


class BadDay:
    """The programs, their clients, and what Prometheus says; ``factor`` is that of ``quicker()``."""

    def __init__(self, programs: Programs, factor: int) -> None:
        self._programs = programs
        self._factor = factor
        self._directory = programs.directory
        self._fleet = Fleet(programs)
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._held: list[socket.socket] = []
        self.unexpected: set[tuple[str, str]] = set()
        self.errors: list[str] = []
        self.seen: dict[tuple[str, str], Seen] = {}
        self.healthy_mails = 0
        self._begun: dict[tuple[str, str], float] = {}

    # Clients

    def again(self, seconds: float, dialogue: Callable[[], object]) -> None:
        """Have a client do this every so many seconds, beginning now, until the day is over."""

        def work() -> None:
            while not self._stopped.is_set():
                begin = time.monotonic()
                try:
                    dialogue()
                except (OSError, ValueError, AssertionError) as error:
                    self.errors.append(f"{dialogue}: {error!r}")
                self._stopped.wait(max(0.0, begin + seconds - time.monotonic()))

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def hold(self, port: int, count: int) -> None:
        """Clients that connect, and stay, for every minute they send NOOP."""
        held = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(count)]
        self._held += held

        def noop() -> None:
            for sock in held:
                sock.recv(4096)
                sock.sendall(b"NOOP\r\n")

        self.again(60, noop)

    def expect(self, alert: str, instance: str, fault: str) -> None:
        """This alert, because of a fault that there is from now on."""
        self.seen[alert, instance] = Seen(alert, instance, fault)
        self._begun[alert, instance] = time.time()

    # The day

    def morning(self) -> Prometheus:
        """Start everything, and Prometheus, which has scraped all programs."""
        fleet = self._fleet
        core = fleet.core("healthy-core", "--deliver", "discard:", "--users", fleet.users())
        fleet.edge("healthy-edge", [core.port])
        fleet.core("refusing-core", "--deliver", "discard:", "--domain", "example.org")
        fleet.raising_app("mail_from")
        fleet.core("raising-core", "--proxy-protocol", "required", "mail_from:app")
        fleet.core("slow-raising-core", "--proxy-protocol", "required", "mail_from:app")
        self._held.append(kept_port())
        refused = self._held[0].getsockname()[1]
        fleet.core("cut-off-core", "--deliver", f"lmtp:127.0.0.1:{refused}")
        fleet.core("guessed-core", "--deliver", "discard:", "--users", fleet.users(), "--allow-insecure-auth")
        fleet.core("crowded-core", "--deliver", "discard:", "--max-clients", "3", "--proxy-protocol", "off")
        fleet.core("dying-core", "--deliver", "discard:", "--workers", "2")
        fleet.core("killed-core", "--deliver", "discard:")
        fleet.core("hidden-core", "--deliver", "discard:")
        # It checks all of these, as edges do, with connections that are answered and bring no mail.
        watched = ("refusing", "raising", "slow-raising", "cut-off", "guessed", "hidden", "killed")
        fleet.edge("checking-edge", [fleet.all[f"{each}-core"].port for each in watched])
        fleet.edge("crowded-edge", [core.port], "--max-clients", "10")
        fleet.edge("narrow-edge", [core.port], before=("prlimit", "--nofile=256:256"))
        certs = [fleet.certificate(f"{name}.example.org", days) for name, days in (("ten", 10), ("two", 2))]
        fleet.edge("expiring-edge", [core.port], "--cert", str(certs[0]), "--cert", str(certs[1]))
        fleet.edge("dying-edge", [core.port], "--workers", "2")
        (self._directory / "certs").mkdir()
        (self._directory / "certs" / "mx.pem").write_bytes(fleet.good.read_bytes())
        fleet.edge("reloading-edge", [core.port], "--cert", "certs", "--cert-reload-interval", "2")
        fleet.edge("distrusted-edge", [core.port])
        fleet.edge("injected-edge", [core.port])
        fleet.edge("lonely-edge", [refused])
        fleet.edge("bypassed-edge", [core.port], "--accept-proxy", "--trusted-proxy", "192.0.2.1")
        self._healthy_clients()
        return self._prometheus()

    def _healthy_clients(self) -> None:
        edge = self._fleet.all["healthy-edge"]

        def delivered(codes: list[int]) -> None:
            assert codes[-2:] == [250, 221], codes
            self.healthy_mails += 1

        self.again(0.2, lambda: delivered(clients.over_tls(edge.tls, *clients.mail("b@example.org"))))
        self.again(0.2, lambda: delivered(clients.over_starttls(edge.port, *clients.mail("b@example.org", "c@example.org"))))
        self.again(2, lambda: clients.over_tls(edge.tls, *clients.login("secret")))
        # What every public port gets: scanners, port checks, a device with an old password, an address that nobody has.
        self.again(5, lambda: clients.scan(edge.tls))
        self.again(5, lambda: clients.reset(edge.tls))
        self.again(30, lambda: clients.over_tls(edge.tls, *clients.login("wrong")))
        self.again(30, lambda: clients.over_tls(edge.tls, "EHLO client.example", "RCPT TO:<nobody>", "QUIT"))

    def _prometheus(self) -> Prometheus:
        interval = "15s" if self._factor == 1 else "1s"
        lines = ["global:", f"  scrape_interval: {interval}", f"  evaluation_interval: {interval}"]
        lines += ["rule_files: [rules.yml]", "scrape_configs:"]
        for job in ("edge", "core"):
            lines += [f"  - job_name: fumi-{job}", "    static_configs:"]
            for name, each in self._fleet.all.items():
                if name.endswith(job):
                    lines += [f"      - targets: ['127.0.0.1:{each.metrics}']", f"        labels: {{instance: {name}}}"]
        prometheus = Prometheus.start(self._programs, "\n".join(lines) + "\n", quicker(RULES, self._factor))
        self._standing_faults()
        until(lambda: prometheus.ask("sum(up)") == len(self._fleet.all), "a scrape of all programs", 120)
        return prometheus

    def _standing_faults(self) -> None:
        """What was wrong from the start."""
        self.expect("FumiNoBackendUp", "lonely-edge", "its only backend's port is closed")
        self.expect("FumiCertificateExpiresIn14Days", "expiring-edge", "one certificate is valid for 10 days")
        self.expect("FumiCertificateExpiresIn3Days", "expiring-edge", "one certificate is valid for 2 days")

    def faults(self) -> None:
        """All others, at once."""
        all_, slowly = self._fleet.all, 300 / self._factor / 30
        mail = clients.mail("b@example.com")
        refused = ("EHLO client.example", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>", "QUIT")
        self.expect("FumiPermanentReplies", "refusing-core", "every recipient is answered 550")
        self.again(0.5, lambda: clients.to_core(all_["refusing-core"].port, *refused))
        self.expect("FumiTransientReplies", "raising-core", "a hook raises, two messages a second")
        self.again(0.5, lambda: clients.to_core(all_["raising-core"].port, *refused))
        self.expect("FumiTransientReplies", "slow-raising-core", "a hook raises, 30 messages in a rule's five minutes")
        self.again(slowly, lambda: clients.to_core(all_["slow-raising-core"].port, *refused))
        fault = "the next hop's port is closed, 30 messages in a rule's five minutes"
        self.expect("FumiDeliveriesDeferred", "cut-off-core", fault)
        self.expect("FumiTransientReplies", "cut-off-core", fault)
        self.again(slowly, lambda: clients.to_core(all_["cut-off-core"].port, *mail))
        self.expect("FumiAuthFailures", "guessed-core", "four wrong passwords a second")
        self.again(0.5, lambda: clients.to_core(all_["guessed-core"].port, *clients.login("wrong")))
        self.again(0.5, lambda: clients.to_core(all_["guessed-core"].port, *clients.login("wrong", "LOGIN")))
        self.expect("FumiProxyHeadersRefused", "hidden-core", "a client without a PROXY header, again and again")
        self.again(slowly, lambda: clients.to_core(all_["hidden-core"].port, "EHLO x", header=b""))
        self.expect("FumiProxyHeadersRefused", "bypassed-edge", "a client that is no trusted load balancer, again and again")
        self.again(slowly, lambda: clients.scan(all_["bypassed-edge"].tls))
        self._crowds(slowly)
        self._certificate_faults()
        self._deaths()

    def _crowds(self, slowly: float) -> None:
        crowded, narrow, core = (self._fleet.all[name] for name in ("crowded-edge", "narrow-edge", "crowded-core"))
        self.expect("FumiConnectionsNearLimit", "crowded-edge", "10 clients stay, of --max-clients 10")
        self.expect("FumiConnectionLimitReached", "crowded-edge", "others are rejected meanwhile")
        self.hold(crowded.port, 10)
        self.again(slowly, lambda: clients.scan(crowded.port))
        fault = "3 clients stay, of --max-clients 3, others are answered 421"
        self.expect("FumiConnectionLimitReached", "crowded-core", fault)
        self.expect("FumiTransientReplies", "crowded-core", fault)
        self.hold(core.port, 3)
        self.again(slowly, lambda: clients.to_core(core.port, header=b""))
        fault = "clients stay until nearly all of 256 descriptors are open"
        self.expect("FumiDescriptorsNearLimit", "narrow-edge", fault)
        self.expect("FumiConnectionsNearLimit", "narrow-edge", fault)
        self.hold(narrow.port, int(narrow.series()["fumi_edge_connections_limit"]) - 2)

    def _certificate_faults(self) -> None:
        self.expect("FumiCertificateReloadFailed", "reloading-edge", "its certificate file is overwritten with garbage")
        (self._directory / "certs" / "mx.pem").write_text("garbage\n")
        self.expect("FumiHandshakeFailures", "distrusted-edge", "two clients a second do not trust the certificate, one does")
        self.again(0.5, lambda: clients.distrust(self._fleet.all["distrusted-edge"].tls))
        self.again(1, lambda: clients.over_tls(self._fleet.all["distrusted-edge"].tls, "QUIT"))
        self.expect("FumiInjections", "injected-edge", "MAIL right after STARTTLS, once")
        clients.inject(self._fleet.all["injected-edge"].port)

    def _deaths(self) -> None:
        self.expect("FumiTargetDown", "killed-core", "kill -9")
        self.expect("FumiBackendDown", "checking-edge", "kill -9 of one of its 7 backends")
        self._programs.stop(self._fleet.all["killed-core"].process, signal.SIGKILL)
        for name in ("dying-edge", "dying-core"):
            self.expect("FumiWorkerRestarts", name, "kill -9 of a worker")
            victim = proc.children(self._fleet.all[name].process.pid)[0]
            os.kill(victim, signal.SIGKILL)

    def watch(self, prometheus: Prometheus) -> bool:
        """Note what is pending and firing now, a few times a second. Whether everything expected has fired."""
        self._stopped.wait(0.2)
        now = time.time()
        for each in prometheus.get("alerts")["alerts"]:
            key = (each["labels"]["alertname"], each["labels"]["instance"])
            if key not in self.seen:
                self.unexpected.add(key)
                continue
            seen, after = self.seen[key], now - self._begun[key]
            seen.pending = after if seen.pending is None else seen.pending
            if each["state"] == "firing" and seen.firing is None:
                seen.firing = after
        return all(each.firing is not None for each in self.seen.values())

    def night(self) -> None:
        """Have all clients end."""
        self._stopped.set()
        for each in self._threads:
            each.join(90)
        for sock in self._held:
            sock.close()


def table(day: BadDay) -> Iterator[str]:
    """The alerts, the faults, and the seconds until pending and firing."""
    yield f"{'alert':31} {'instance':18} {'pending':>8} {'firing':>8}  fault"
    for each in sorted(day.seen.values(), key=lambda each: (each.alert, each.instance)):
        pending, firing = ("-" if value is None else f"{value:.1f}" for value in (each.pending, each.firing))
        yield f"{each.alert:31} {each.instance:18} {pending:>8} {firing:>8}  {each.fault}"


def run(directory: Path, factor: int, patience: float) -> BadDay:
    """The whole day, until everything expected fires, or ``patience`` seconds are over; everything is stopped then."""
    with contextlib.closing(Programs(directory)) as programs:
        day = BadDay(programs, factor)
        try:
            prometheus = day.morning()
            day.faults()
            # An alert that did not fire is in the table.
            with contextlib.suppress(AssertionError):
                until(lambda: day.watch(prometheus), "every alert", patience)
        finally:
            day.night()
        return day


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        day = run(
            Path(directory), int(sys.argv[1]) if len(sys.argv) > 1 else 1, float(sys.argv[2]) if len(sys.argv) > 2 else 45 * 60
        )
    print(*table(day), f"unexpected: {sorted(day.unexpected)}", f"healthy mails: {day.healthy_mails}", sep="\n")
    print(*sorted(set(day.errors))[:20], sep="\n")
