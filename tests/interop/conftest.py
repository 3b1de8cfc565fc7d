"""What the tests with programs of others share: a core that knows one user, and an edge in front of a core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi
from fumi_core.testing import RunningServer, running


async def _let_joe_in(ctx: Any, next: Any) -> None:
    known = ctx.credentials.validate_password("secret") or ctx.credentials.access_token == "token"
    if ctx.credentials.username == "joe" and known:
        ctx.accept("joe")


def _nobody_is_unknown(ctx: Any, next: Any) -> Any:
    if ctx.address.address.startswith("nobody@"):
        ctx.reject("No such user")
    return next()


async def _full_is_full(ctx: Any, next: Any) -> None:
    for each in ctx.session.envelope.rcpt_to:
        if each.address.startswith("full@"):
            ctx.reject_recipient(each.address, "4.2.2 Mailbox full", 452)
    await next()


@pytest.fixture
def core() -> Iterator[Callable[..., RunningServer]]:
    """Runs a core that lets joe in, by his password or his token, and knows no nobody@; in LMTP, full@ gets no mail."""
    with contextlib.ExitStack() as servers:

        def start(**options: Any) -> RunningServer:
            methods = ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2")
            usual = {"auth_optional": True, "auth_methods": methods, "allow_insecure_auth": True, "name": "mx.example"}
            app = Fumi(**{**usual, "close_timeout": 0.2, **options})
            app.on_auth(_let_joe_in)
            app.on_rcpt_to(_nobody_is_unknown)
            if app.options.lmtp:
                app.on_data(_full_is_full)
            return servers.enter_context(running(app))

        yield start


@dataclass
class Edge:
    """The ports of a fumi-edge."""

    tls_port: int
    starttls_port: int


@pytest.fixture
def edge(programs: Any, certificate: tuple[Path, Path]) -> Callable[..., Edge]:
    """fumi-edge in front of a core that wants a PROXY header."""

    def start(core_port: int, *flags: str) -> Edge:
        ports = Edge(programs.free_port(), programs.free_port())
        command = ["--cert", certificate[0], "--key", certificate[1], "--backend", f"127.0.0.1:{core_port}"]
        command += ["--listen", f"127.0.0.1:{ports.tls_port}", "--starttls-listen", f"127.0.0.1:{ports.starttls_port}", *flags]
        programs.start(programs.bin / "fumi-edge", *command, port=ports.starttls_port, log="edge.log")
        return ports

    return start
