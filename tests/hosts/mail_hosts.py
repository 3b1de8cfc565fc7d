"""Six hosts: a client, HAProxy at layer 4, two edges, two cores, and the store that the cores deliver to by LMTP."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.certificates import self_signed
from tests.support.hosts import Host, network
from tests.support.load import Load
from tests.support.starter import BIN, ROOT, Process
from tests.support.waiting import until

HOSTS = {"client": 10, "balancer": 2, "edge1": 11, "edge2": 12, "core1": 21, "core2": 22, "store": 31}
PORTS = {"balancer": 25, "edge1": 10025, "edge2": 10025, "core1": 2525, "core2": 2525, "store": 24}
BALANCER = {"FUMI_RATE_PER_IP": "100000", "FUMI_MAX_CLIENTS_PER_IP": "3000", "FUMI_MAX_CLIENTS": "4000"}
RATE = 8.0
"""Messages a second."""


class MailHosts:
    """The programs on them, each started and stopped by its host's name."""

    def __init__(self, hosts: dict[str, Host], directory: Path) -> None:
        self.hosts = hosts
        self.directory = directory
        self.loads = 0
        self._certificate, key = self_signed(directory, "mx.example.org")
        self._running: dict[str, Process] = {}
        self.clients: list[Process] = []
        address = {name: host.address for name, host in hosts.items()}
        edge: list[str | Path] = [BIN / "fumi-edge", "--accept-proxy", "--trusted-proxy", address["balancer"]]
        edge += ["--cert", self._certificate, "--key", key]
        edge += [word for port in (10025, 10587) for word in ("--starttls-listen", f":{port}")] + ["--listen", ":10465"]
        edge += [word for core in ("core1", "core2") for word in ("--backend", f"{address[core]}:2525")]
        core: list[str | Path] = [BIN / "fumi-core", "--listen", ":2525", "--domain", "example.org"]
        core += [word for name in ("edge1", "edge2") for word in ("--trusted-proxy", address[name])]
        core += ["--deliver", f"lmtp:{address['store']}:24"]
        store: list[str | Path] = [BIN / "fumi-core", "--lmtp", "--listen", ":24", "--deliver", f"maildir:{self.inbox}"]
        store += ["--proxy-protocol", "off"]
        self._commands: dict[str, list[str | Path]] = {
            "balancer": ["haproxy", "-W", "-f", ROOT / "haproxy" / "layer4.cfg"],
            "edge1": edge, "edge2": edge, "core1": core, "core2": core, "store": store,
        }  # fmt: skip
        self._environment = {
            **os.environ, **BALANCER, "FUMI_NODE_1": address["edge1"], "FUMI_NODE_2": address["edge2"], "FUMI_USER": "root",
        }  # fmt: skip

    @property
    def inbox(self) -> Path:
        return self.directory / "inbox"

    def start(self, *names: str) -> None:
        """Start the programs of these hosts, and wait until all listen."""
        for name in names:
            self._running[name] = self.hosts[name].start(
                *self._commands[name], log=self.directory / f"{name}.log", cwd=self.directory, env=self._environment
            )
        until(lambda: all(map(self._started_or_ended, names)), f"{names} listening")
        for name in names:
            assert self._running[name].poll() is None, (self.directory / f"{name}.log").read_text()

    def _started_or_ended(self, name: str) -> bool:
        return self.hosts[name].listens(PORTS[name]) or self._running[name].poll() is not None

    def kill(self, name: str) -> None:
        """Kill -9, workers too: each program has a session of its own."""
        os.killpg(self._running[name].pid, signal.SIGKILL)
        self._running[name].wait(60)

    def terminate(self, name: str) -> None:
        self._running[name].send_signal(signal.SIGTERM)

    def reload(self, name: str) -> None:
        self._running[name].send_signal(signal.SIGUSR2 if name == "balancer" else signal.SIGHUP)

    def restart(self, name: str) -> None:
        """Start it again when it has ended."""
        self._running[name].wait(120)
        self.start(name)

    def close(self) -> None:
        for process in [*self._running.values(), *self.clients]:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)

    def start_idle_client(self) -> Path:
        """Start a client that sends EHLO and nothing else; return the file with the replies, and "ended" at the end."""
        log = self.directory / f"idle{len(self.clients)}.log"
        command = [sys.executable, "-m", "tests.hosts.idle", self.hosts["balancer"].address, "25"]
        self.clients.append(self.hosts["client"].start(*command, log=log, cwd=ROOT))
        return log

    def idle_sessions_ended(self) -> int:
        """How many sessions of such clients have ended in the cores."""
        logs = [(self.directory / f"{name}.log").read_text() for name in ("core1", "core2")]
        return sum(len(re.findall(r" session ended .*helo=idle\.example\.net", log)) for log in logs)

    def load(self) -> Load:
        """Start a load from the client; ids of messages differ from load to load."""
        self.loads += 1
        address, name = self.hosts["balancer"].address, f"load{self.loads}"
        load = Load(self.hosts["client"], address, RATE, self._certificate, self.directory, name)
        self.clients.append(load.process)
        return load

    def texts(self) -> Iterator[str]:
        """All messages that are stored."""
        for path in (self.inbox / "new").iterdir():
            yield path.read_text()


@contextlib.contextmanager
def mail_hosts(directory: Path) -> Iterator[MailHosts]:
    with network(**HOSTS) as hosts, contextlib.closing(MailHosts(hosts, directory)) as mail:
        mail.start("store", "core1", "core2", "edge1", "edge2")
        mail.start("balancer")  # a node that does not listen when it starts is down until a check succeeds
        yield mail
