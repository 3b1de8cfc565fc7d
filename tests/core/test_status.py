"""The status page of the core, as the real program serves it."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from fumi_core import Fumi
from fumi_core.delivery.discard import Discard
from fumi_core.program import status, target_checks
from fumi_core.program.served import ServedApp
from tests.core.client import Connect
from tests.core.programs import Program, Start, get
from tests.support.ports import free_port
from tests.support.proc import children
from tests.support.programs import listening
from tests.support.status_page import read_json, read_page
from tests.support.waiting import until


class Core:
    """A running fumi-core, and the port of its page."""

    def __init__(self, start: Start, *flags: str) -> None:
        self.port, self.metrics = free_port(), free_port()
        addresses = ("--listen", f"127.0.0.1:{self.port}", "--metrics", f"127.0.0.1:{self.metrics}")
        self.program: Program = start("--proxy-protocol", "off", "--name", "mx.example.org", *addresses, *flags)
        until(lambda: listening(self.metrics), "the page")


def mail(core: Core, connect: Connect, recipient: str = "b@example.org") -> None:
    client = connect(core.port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@example.org>")
    client.say(f"RCPT TO:<{recipient}>")
    client.say("DATA")
    client.say("Subject: x\r\n\r\nx\r\n.")
    client.say("QUIT")


def test_it_shows_sessions_messages_replies_and_deliveries(start: Start, connect: Connect) -> None:
    core = Core(start, "--deliver", "discard:")
    mail(core, connect)
    connect(core.port).say("NONSENSE")
    until(lambda: read_json(core.metrics)["workers"][0]["connections"] == 1, "the end of the first session")
    page, headers = read_page(core.metrics)
    assert page.state == "ready"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert page.row("Messages", "accepted")[1:] == ["1", "100 %"]
    assert page.row("Deliveries", "discard ok")[1:] == ["1", "100 %"]
    assert page.row("Replies", "250")[1] == "4"
    assert page.row("Replies", "502" if "502" in str(page.tables["Replies"]) else "500")[1] == "1"
    assert page.row("Sessions", "none")[1] == "2"
    assert page.row("Listeners", f"127.0.0.1:{core.port}")[:3] == ["SMTP", "off", "discard:"]
    assert page.row("Durations", "DATA to reply")[0].endswith("s")
    titles = ("Current sessions", "Session rate", "Messages", "Replies", "Deliveries", "Message traffic")
    assert [label.split(":")[0] for label in page.labels] == list(titles)
    facts = read_json(core.metrics)
    assert (facts["program"], facts["pid"], facts["state"]) == ("fumi-core", core.program.process.pid, "ready")
    assert {each["name"]: each["total"] for each in facts["messages"]}["accepted"] == 1


def test_a_next_hop_that_is_down_is_named_with_its_last_failure(start: Start, connect: Connect) -> None:
    hop = f"smtp:127.0.0.1:{free_port()}"
    core = Core(start, "--deliver", hop, "--domain", "example.org")
    page, _ = read_page(core.metrics)
    assert page.state == "not ready"
    assert f"{hop}: Connection refused" in page.words
    state, check, error = page.row("Delivery and next hop", hop)
    assert (state, error) == ("down", "none")
    assert re.fullmatch(r"[\d:]{8}: Connection refused", check)
    mail(core, connect)
    until(lambda: read_json(core.metrics)["targets"][0]["last_error"], "the failure")
    assert re.match(r"[\d:]{8}: \w", read_page(core.metrics)[0].row("Delivery and next hop", hop)[2])
    assert get(f"http://127.0.0.1:{core.metrics}/healthz") == (200, "ok\n")


def test_a_rejected_client_is_an_event(start: Start, connect: Connect) -> None:
    core = Core(start, "--deliver", "discard:", "--max-clients", "1")
    connect(core.port)
    connect(core.port, banner=False)
    until(lambda: [each for each in read_json(core.metrics)["events"] if each["event"] == "rejected"], "the event")


def test_workers_are_one_core(start: Start, connect: Connect) -> None:
    core = Core(start, "--deliver", "discard:", "--workers", "2")
    until(lambda: [each["state"] for each in read_json(core.metrics)["workers"]] == ["serving"] * 2, "the workers")
    for _ in range(4):
        mail(core, connect)
    until(lambda: {each["name"]: each["total"] for each in read_json(core.metrics)["messages"]}["accepted"] == 4, "the sum")
    facts = read_json(core.metrics)
    assert facts["pid"] == core.program.process.pid
    pids = {each["pid"] for each in facts["workers"]}
    assert pids <= set(children(core.program.process.pid))
    os.kill(min(pids), signal.SIGKILL)
    until(lambda: [each for each in read_json(core.metrics)["events"] if each["event"] == "worker died"], "the master's event")


def test_a_draining_core_says_so(start: Start, connect: Connect) -> None:
    core = Core(start, "--deliver", "discard:", "--drain-timeout", "60")
    client = connect(core.port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@example.org>")
    core.program.process.send_signal(signal.SIGTERM)
    until(lambda: read_page(core.metrics)[0].state == "draining", "the drain")
    assert "draining: 1 connection open" in read_page(core.metrics)[0].words


@pytest.mark.parametrize("path", ["maildir", "maildir <b>"])
def test_paths_are_text(path: str, start: Start, tmp_path: Path) -> None:
    target = f"maildir:{tmp_path / path}"
    core = Core(start, "--deliver", target)
    assert read_page(core.metrics)[0].row("Delivery and next hop", target)[0] == "up"


def test_each_listener_has_its_own_target(start: Start, tmp_path: Path) -> None:
    metrics, ports = free_port(), (free_port(), free_port())
    targets = ["discard:", f"maildir:{tmp_path / 'mail'}"]
    tables = "".join(
        f'[[core.listener]]\naddress = "127.0.0.1:{port}"\ndeliver = "{target}"\nproxy-protocol = "off"\n'
        for port, target in zip(ports, targets, strict=True)
    )
    (tmp_path / "core.toml").write_text(f'[core]\nmetrics = "127.0.0.1:{metrics}"\nname = "mx.example"\n{tables}')
    start("--config", "core.toml")
    page, _ = read_page(metrics)
    assert [row[:2] for row in page.tables["Delivery and next hop"][1:]] == [[target, "up"] for target in targets]
    assert [page.row("Listeners", f"127.0.0.1:{port}")[2] for port in ports] == targets


class Silent(Discard):
    """A target whose check hangs until it is released; ``asked`` counts checks."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.asked = 0

    def dependency_problem(self) -> str | None:
        self.asked += 1
        self.released.wait()
        return None


def test_a_target_that_says_nothing_does_not_keep_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_checks, "CHECK_TIMEOUT", 0.05)
    served = [ServedApp(Fumi()), ServedApp(Fumi())]
    silent = [Silent(), Silent()]
    for number, (app, target) in enumerate(zip(served, silent, strict=True)):
        app.target, app.settings = target, {"deliver": f"discard:{number}"}
    targets = status.Targets(target_checks.TargetChecks())
    for _ in range(2):
        assert [row["problem"] for row in targets.rows(served, ())] == [
            "discard:0: no answer within 0.05 s",
            "discard:1: no answer within 0.05 s",
        ]
    assert [target.asked for target in silent] == [1, 1]
    for target in silent:
        target.released.set()


def test_a_target_whose_check_hangs_is_not_checked_again_until_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that stays open asks every few seconds: each check is a thread, and that of a file system may hang for days."""
    monkeypatch.setattr(target_checks, "CHECK_TIMEOUT", 0.05)
    monkeypatch.setattr(status, "INTERVAL", 0)
    app, silent = ServedApp(Fumi()), Silent()
    app.target, app.settings = silent, {"deliver": "discard:"}
    targets = status.Targets(target_checks.TargetChecks())

    def problem() -> str | None:
        (row,) = targets.rows([app], ())
        found: str | None = row["problem"]
        return found

    assert [problem() for _ in range(3)] == ["discard:: no answer within 0.05 s"] * 3
    assert silent.asked == 1
    silent.released.set()
    until(lambda: problem() is None, "the next check")
    assert silent.asked >= 2


def test_readiness_names_a_target_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many probes ask, one thread checks."""
    monkeypatch.setattr(target_checks, "CHECK_TIMEOUT", 0.05)
    well, app, silent = ServedApp(Fumi()), ServedApp(Fumi()), Silent()
    well.target, well.settings = Discard(), {"deliver": "discard:0"}
    app.target, app.settings = silent, {"deliver": "discard:1"}
    checks = target_checks.TargetChecks()
    assert [checks.problem([well, app]) for _ in range(3)] == ["discard:1: no answer within 0.05 s"] * 3
    assert silent.asked == 1
    silent.released.set()
    until(lambda: checks.problem([well, app]) is None, "the next check")
