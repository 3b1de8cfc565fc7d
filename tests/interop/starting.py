"""What the fixtures of these tests hand out: the functions that start programs, by their types, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fumi_core.testing import RunningServer
from tests.support.starter import Process

StartCore = Callable[..., RunningServer]
"""``core``: takes the options of ``fumi_core.Fumi``."""


@dataclass
class Edge:
    """The ports of a fumi-edge."""

    tls_port: int
    starttls_port: int


class StartEdge(Protocol):
    """``edge``"""

    def __call__(self, core_port: int, *flags: str) -> Edge: ...


class StartHAProxy(Protocol):
    """``haproxy``: with a file of haproxy/; the variables are named without their FUMI_."""

    def __call__(
        self, name: str, port: int, log: str = "haproxy.log", flags: Sequence[str] = (), **variables: object
    ) -> Process: ...


class StartStunnel(Protocol):
    """``stunnel``: with a file of stunnel/; the variables are named without their FUMI_."""

    def __call__(self, name: str, port: int, log: str = "stunnel.log", **variables: object) -> Process: ...


class StartFumiCore(Protocol):
    """``fumi_core``: the program; its port and its process."""

    def __call__(self, *flags: str, name: str = "core", port: int | None = None) -> tuple[int, Process]: ...


@dataclass
class ClientCertificate:
    """An authority, and a certificate of it for a client called client.example."""

    ca: Path
    cert: Path
    key: Path
