"""Cores and edges that serve metrics, started by name in one directory."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN, Process

RAISING_APP = """
from fumi_core import Fumi

app = Fumi(auth_optional=True)


@app.on_{phase}
async def bad(ctx, next):
    raise RuntimeError("out of order")
"""


@dataclass
class Program:
    """A program that serves metrics. ``port`` is its SMTP port; of an edge, the one with STARTTLS."""

    process: Process
    metrics: int
    port: int
    tls: int = 0

    def series(self) -> dict[str, float]:
        """The values of all series, by name and labels as they are written."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=60) as answer:
            return {name: float(value) for name, value in re.findall(r"^(\w.*) (\S+)$", answer.read().decode(), re.MULTILINE)}


class Fleet:
    """Starts them; ``all`` has them by name. Edges have the certificate ``good``, unless told otherwise."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.directory = programs.directory
        self.all: dict[str, Program] = {}
        self._authority = Authority(self.directory, "Test CA")
        self.good = self.certificate("mx.example.org", 90)

    def certificate(self, name: str, days: float) -> Path:
        """A file with a new certificate and its key."""
        cert, key = self._authority.issue(name, days=days)
        path = self.directory / f"{name}.pem"
        path.write_bytes(cert.read_bytes() + key.read_bytes())
        return path

    def users(self) -> str:
        """A file for --users, with joe and his password ``secret``."""
        path = self.directory / "users"
        if not path.exists():
            path.write_text(f"joe:{self._programs.run(BIN / 'fumi-core', '--hash-password', given=b'secret').strip()}\n")
        return "users"

    def raising_app(self, phase: str) -> None:
        """A module named like the phase, with an app whose handler for it raises."""
        (self.directory / f"{phase}.py").write_text(RAISING_APP.format(phase=phase))

    def core(self, name: str, *flags: str, port: int | None = None) -> Program:
        port, metrics = port or free_port(), free_port()
        words = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{metrics}", "--name", "core.example", *flags]
        process = self._programs.start(BIN / "fumi-core", *words, port=metrics, log=f"{name}.log")
        self.all[name] = Program(process, metrics, port)
        return self.all[name]

    def edge(self, name: str, backends: list[int], *flags: str, before: tuple[str, ...] = ()) -> Program:
        """``before`` is a program that starts the edge, with its arguments."""
        port, tls, metrics = free_port(), free_port(), free_port()
        words = ["--starttls-listen", f"127.0.0.1:{port}", "--listen", f"127.0.0.1:{tls}", "--metrics", f"127.0.0.1:{metrics}"]
        words += [word for each in backends for word in ("--backend", f"127.0.0.1:{each}")]
        words += [*flags] if "--cert" in flags else ["--cert", str(self.good), *flags]
        process = self._programs.start(*before, BIN / "fumi-edge", *words, port=metrics, log=f"{name}.log")
        self.all[name] = Program(process, metrics, port, tls)
        return self.all[name]
