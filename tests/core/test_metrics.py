"""The core's metrics: nothing that a proxy or a client sends is a label, or keeps an event from being counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from fumi_core import DataContext, Fumi, Next
from fumi_core.handlers.contexts import Context
from fumi_core.proxy_protocol import TLSInfo
from fumi_core.server.metrics import CoreMetrics
from fumi_core.server.setup import PHASES
from fumi_core.smtp.session import Session
from fumi_core.smtp.tally import Tally
from fumi_core.testing import running
from tests.core.client import Connect
from tests.support.waiting import until


@pytest.mark.parametrize("version", ["none", "", "TLSv9", None])
def test_a_session_whose_tls_version_is_strange_is_counted_as_unknown(version: str | None) -> None:
    registry = CollectorRegistry()
    session = Session("id", "mx.example")
    session.secure, session.tls = True, TLSInfo(version=version)
    CoreMetrics(registry, Tally()).session_started(session)
    labels = {"secure": "true", "tls_version": "unknown"}
    assert registry.get_sample_value("fumi_core_sessions_total", labels) == 1


async def _suspended(ctx: Context, next: Next) -> None:
    await asyncio.sleep(0)
    await next()


def _plain(ctx: Context, next: Next) -> Next:
    return next()


def _rejects(ctx: Context, next: Next) -> None:
    ctx.reject("no")


def _fails(ctx: Context, next: Next) -> None:
    raise ValueError


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("handler", [_plain, _suspended, _rejects, _fails])
def test_a_phase_is_timed_once_for_all_its_handlers_however_they_end(
    phase: str, handler: Callable[[Context, Next], object], connect: Connect
) -> None:
    app, registry = Fumi(auth_optional=True, allow_insecure_auth=True), CollectorRegistry()
    app.observer = CoreMetrics(registry, app.tally)
    for each in (_plain, handler):
        getattr(app, f"on_{phase}")(each)
    assert _timed(registry) == dict.fromkeys(PHASES, 0)
    with running(app, record=False) as server:
        client = connect(server.port)
        if client.banner.startswith(b"220"):
            for line in ("EHLO x", "AUTH PLAIN AGEAYg==", "MAIL FROM:<>", "RCPT TO:<c@d.example>"):
                client.say(line)
            if client.say("DATA").startswith(b"354"):
                client.say(".")
        client.close()
        until(lambda: _timed(registry)[phase] == 1)
        assert _timed(registry) == {**dict.fromkeys(PHASES, 0), phase: 1}
    assert registry.get_sample_value("fumi_core_hook_seconds_sum", {"phase": phase})


def _timed(registry: CollectorRegistry) -> dict[str, float | None]:
    return {phase: registry.get_sample_value("fumi_core_hook_seconds_count", {"phase": phase}) for phase in PHASES}


def test_handlers_are_timed_until_they_have_ended(connect: Connect) -> None:
    app, registry = Fumi(auth_optional=True), CollectorRegistry()
    app.observer = CoreMetrics(registry, app.tally)
    called, go_on = threading.Event(), threading.Event()

    @app.on_data
    async def wait(ctx: DataContext, next: Next) -> None:
        called.set()
        await asyncio.to_thread(go_on.wait)

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"hi\r\n.\r\n")
        called.wait()
        before = _timed(registry)["data"]
        go_on.set()
        assert before == 0
        assert client.reply().startswith(b"250")
        assert _timed(registry)["data"] == 1
        client.close()
