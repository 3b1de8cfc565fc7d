"""Hosts on one switch: network namespaces with a cable each, which can be pulled.

A namespace lives as long as the process that holds it, which ends with the test run. Making one needs root.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support import starter
from tests.support.starter import ROOT, Process
from tests.support.waiting import until

PREFIX = "10.7.0"


class Namespace:
    """A network of its own, with nothing in it but lo."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.pid = self._holder.pid
        ours = Path("/proc/self/ns/net").readlink()
        until(lambda: Path(f"/proc/{self.pid}/ns/net").readlink() != ours, "a network namespace")
        self.ip("link set lo up")

    def command(self, *words: str | Path) -> list[str]:
        """The words that run a command in it; the process is the command's, with nothing in between."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *map(str, words)]

    def ip(self, words: str) -> None:
        subprocess.run(self.command("ip", *words.split()), check=True)

    def close(self) -> None:
        self._holder.communicate()


class Host(Namespace):
    """A host with one cable to the switch."""

    def __init__(self, switch: Namespace, name: str, number: int) -> None:
        super().__init__()
        self.name = name
        self.address = f"{PREFIX}.{number}"
        self._switch = switch
        switch.ip(f"link add {name} type veth peer name eth0 netns {self.pid}")
        switch.ip(f"link set {name} master br0 up")
        self.ip(f"addr add {self.address}/24 dev eth0")
        self.ip("link set eth0 up")

    def pull(self) -> None:
        """Pull the cable: its programs go on, without network."""
        self._switch.ip(f"link set {self.name} down")

    def plug(self) -> None:
        self._switch.ip(f"link set {self.name} up")

    def forget_neighbors(self) -> None:
        """Have it ask by ARP for each host that it sends to from now on."""
        self.ip("neigh flush dev eth0")

    @contextlib.contextmanager
    def slow(self, seconds: float, loss: float, log: Path) -> Iterator[None]:
        """With a cable on which each packet takes so long, and a share of them is lost, see tests/support/slow_link.py."""
        with log.open("w") as output:
            command = [
                sys.executable,
                "-m",
                "tests.support.slow_link",
                str(self.pid),
                str(self._switch.pid),
                str(seconds),
                str(loss),
            ]
            relay = starter.start(*command, stdout=output, stderr=output, cwd=ROOT)
        try:
            until(lambda: log.read_text() or relay.poll() is not None, "a slow link")
            self._switch.ip(f"link set {self.name} down")
            self._switch.ip("link set slow master br0 up")
            self.ip(f"addr del {self.address}/24 dev eth0")
            self.ip(f"addr add {self.address}/24 dev slow")
            self.ip("link set slow up")
            yield
        finally:
            # Its two ends are removed with it.
            relay.send_signal(15)
            relay.wait(60)
            self.ip(f"addr add {self.address}/24 dev eth0")
            self._switch.ip(f"link set {self.name} up")

    def start(self, *words: str | Path, log: Path, cwd: Path, env: dict[str, str] | None = None) -> Process:
        with log.open("ab") as output:
            return starter.start(*self.command(*words), stdout=output, stderr=output, cwd=cwd, env=env)

    def listens(self, port: int) -> bool:
        """Whether somebody there listens on a TCP port."""
        tables = [Path(f"/proc/{self.pid}/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
        return any(f":{port:04X} " in line.split(" 0A ")[0] for table in tables for line in table if " 0A " in line)


@contextlib.contextmanager
def network(**numbers: int) -> Iterator[dict[str, Host]]:
    """A switch and hosts of these names, with these last numbers in their addresses."""
    with contextlib.ExitStack() as stack:
        switch = Namespace()
        stack.callback(switch.close)
        switch.ip("link add br0 type bridge")
        switch.ip("link set br0 up")
        hosts = {}
        for name, number in numbers.items():
            hosts[name] = Host(switch, name, number)
            stack.callback(hosts[name].close)
        yield hosts
