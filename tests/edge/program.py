"""The real fumi-edge: running, with its log and metrics, or as a command that ends by itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.edge.backends import Backend
from tests.support.proc import children, memory, open_files
from tests.support.starter import BIN, finished, start
from tests.support.waiting import PATIENCE, until


def run(*flags: str | Path, environment: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Run to the end; (status, lines of stderr but for the usage hint)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FUMI_")}
    done = finished("fumi-edge", *flags, env=clean | (environment or {}))
    return done.returncode, [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]


class StartEdge(Protocol):
    """The fixture ``edge``."""

    def __call__(
        self,
        *flags: str,
        backend: Backend | str,
        certs: Sequence[str | Path] = ...,
        inherited: Sequence[int] = (),
        prefix: Sequence[str | Path] = (),
    ) -> Program: ...


class Program:
    """The real fumi-edge, logging JSON. ``prefix`` is a command that runs it."""

    def __init__(
        self, *flags: str, cwd: Path | None = None, inherited: Sequence[int] = (), prefix: Sequence[str | Path] = ()
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FUMI_")}
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        self.stdout, self._stderr = os.fdopen(out), os.fdopen(err)
        command = (*prefix, BIN / "fumi-edge", "--log-format", "json", *flags)
        self.process = start(*command, stdout=stdout, stderr=stderr, cwd=cwd, env=environment, inherited=inherited)
        os.close(stdout)
        os.close(stderr)
        self.logs: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_until_started("--metrics" in flags or "--dev" in flags)

    def _read(self) -> None:
        for line in self._stderr:
            try:
                self.logs.append(json.loads(line))
            except ValueError:
                self.noise.append(line)

    def _wait_until_started(self, metrics: bool) -> None:
        last = "serving metrics" if metrics else "listening"
        until(lambda: self.events(last) or self.process.poll() is not None, "the start of the edge")
        if self.process.poll() is not None:
            self._reader.join(PATIENCE)  # for its last words
        assert self.process.poll() is None, self.noise
        if metrics and not self.events("serving metrics")[0]["address"].startswith("unix:"):
            # The line is logged when the socket is bound, which is before it is served.
            self.fetch("/healthz")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.logs if entry["event"] == name]

    def _port(self, mode: str) -> int:
        found = until(lambda: [entry for entry in self.events("listening") if entry["mode"] == mode], f"a {mode} listener")
        return int(found[0]["listener"].rpartition(":")[2])

    @property
    def tls_port(self) -> int:
        return self._port("tls")

    @property
    def starttls_port(self) -> int:
        return self._port("starttls")

    @property
    def metrics_port(self) -> int:
        return int(self.events("serving metrics")[0]["address"].rpartition(":")[2])

    def fetch(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.metrics_port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str, /, **labels: str) -> float:
        """One sample of /metrics; all the given labels must be there, others may."""
        for line in self.fetch("/metrics")[1].splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                have = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if labels.items() <= have.items():
                    return float(found[3])
        raise LookupError(f"{name} {labels}")

    def ended(self, count: int = 1) -> list[dict[str, Any]]:
        """The log lines of connections that have ended, once there are so many."""
        until(lambda: len(self.events("connection ended")) >= count, f"the end of {count} connections")
        return self.events("connection ended")

    def workers(self) -> set[int]:
        """The pids of the processes that serve clients: the master's children that have the listening socket."""
        pid, port = self.process.pid, f":{self.tls_port:04X}"
        # The kernel's table may be thousands of lines long.
        sockets = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines() if port in line)
        listening = {f"socket:[{words[9]}]" for words in sockets if words[1].endswith(port) and words[3] == "0A"}
        return {child for child in children(pid) if listening.intersection(open_files(child))}

    def memory(self) -> int:
        """Resident bytes."""
        return memory(self.process.pid)

    def rests(self) -> bool:
        """Whether its event loop sleeps: it has done all that there was to do, and does not just wait for the processor."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        """End whatever is left of it, workers too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
