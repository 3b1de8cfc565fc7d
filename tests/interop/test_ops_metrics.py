"""ops/prometheus and ops/grafana ask for what the programs really serve; and Prometheus, asked, says what was sent."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import smtplib
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.prometheus import OPS, RULES, Prometheus
from tests.support.starter import BIN
from tests.support.waiting import until

DASHBOARD = json.loads((OPS / "grafana" / "fumi.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
ALERTS = re.findall(r"- alert: (\w+)", RULES)

Metrics = dict[str, list[dict[str, str]]]
"""The label sets of each metric."""


class Both(NamedTuple):
    """The programs under load: ports, and what each serves under /metrics."""

    tls_port: int
    starttls_port: int
    edge: str
    core: str

    def read(self) -> str:
        texts = []
        for address in (self.edge, self.core):
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
                texts.append(answer.read().decode())
        return "".join(texts)


@pytest.fixture
def both(programs: Programs, certificate: CertificateFiles) -> Both:
    core, edge, tls, starttls, behind = (free_port() for _ in range(5))
    password = programs.run(BIN / "fumi-core", "--hash-password", given=b"secret\n").strip()
    (programs.directory / "users").write_text(f"joe:{password}\n")
    flags = ["--listen", f"127.0.0.1:{behind}", "--domain", "example.org", "--users", "users"]
    programs.start(BIN / "fumi-core", *flags, "--metrics", f"127.0.0.1:{core}", port=core, log="core.log")
    flags = ["--listen", f"127.0.0.1:{tls}", "--starttls-listen", f"127.0.0.1:{starttls}", "--backend", f"127.0.0.1:{behind}"]
    flags += [
        "--max-clients",
        "100",
        "--cert",
        str(certificate[0]),
        "--key",
        str(certificate[1]),
        "--metrics",
        f"127.0.0.1:{edge}",
    ]
    programs.start(BIN / "fumi-edge", *flags, port=edge, log="edge.log")
    return Both(tls, starttls, f"127.0.0.1:{edge}", f"127.0.0.1:{core}")


@pytest.fixture
def metrics(both: Both) -> Metrics:
    """What the programs serve, as Prometheus has it: with ``job`` and ``instance``; and what the rules record."""
    found: Metrics = {"up": [{"job": job, "instance": ""} for job in ("fumi-edge", "fumi-core")]}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", both.read(), re.MULTILINE):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        jobs = [name[:9].replace("_", "-")] if name.startswith("fumi_") else ["fumi-edge", "fumi-core"]
        found.setdefault(name, []).extend({**pairs, "job": job, "instance": ""} for job in jobs)
    for name in ("fumi_edge_worker_restarts_total", "fumi_core_worker_restarts_total"):
        # Only a program with workers has them.
        found.setdefault(name, [{"job": "", "instance": ""}])
    for name, expression in rules("record"):
        labels = re.search(r"\bby \(([^)]*)\)", expression)
        # Without "by" it is made of what is recorded before it.
        found[name] = [dict.fromkeys(labels[1].split(", "), "")] if labels else found[expression.split()[0]]
    return found


def rules(kind: str) -> list[tuple[str, str]]:
    """(name, expression) of each recording or alerting rule; an expression may go on in lines indented further."""
    return re.findall(rf"- {kind}: (\S+)\n\s+expr: (.*(?:\n {{10}}.*)*)", RULES)


def wrong(expression: str, metrics: Metrics) -> Iterator[str]:
    """What an expression asks for and nobody serves: a metric, a label, a value of a label."""
    labels = {"le"}
    bare = re.sub(r'"[^"]*"', '""', expression)
    for name in set(re.findall(r"(?<![\w:$])(?:(?:fumi|process|python)_\w*[\w:]*|\w+:[\w:]+)", bare)) - set(metrics):
        yield name
    for name, selector in re.findall(r"([a-z_][\w:]*)(?:\{([^}]*)\})?", expression):
        if name not in metrics:
            continue
        labels |= set().union(*metrics[name])
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selector):
            values = {each.get(label) for each in metrics[name]} - {None}
            if not values:
                yield f"{name}{{{label}}}"
            elif label != "instance":
                for each in value.split("|") if "~" in operator and "(" not in value else [value]:
                    if not any(re.fullmatch(each, str(have)) for have in values):
                        yield f'{name}{{{label}="{each}"}}'
    for group in re.findall(r"\b(?:by|on|without|ignoring) \(([^)]*)\)", expression):
        yield from set(filter(None, group.split(", "))) - labels


def test_every_rule_queries_metrics_and_labels_that_exist(metrics: Metrics) -> None:
    everything = [*rules("record"), *rules("alert")]
    assert len(everything) == RULES.count("expr:")
    assert {name: found for name, expression in everything if (found := list(wrong(expression, metrics)))} == {}


def test_every_panel_queries_metrics_and_labels_that_exist(metrics: Metrics) -> None:
    known = set().union(*(labels for each in metrics.values() for labels in each))
    for title, expression, legend in QUERIES:
        assert list(wrong(expression, metrics)) == [], title
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known, title


def test_every_metric_has_a_place_on_the_dashboard(metrics: Metrics) -> None:
    asked = " ".join(expression for _, expression, _ in QUERIES)
    for name, expression in rules("record"):
        asked += expression if name in asked else ""
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics if name != "up" and ":" not in name}
    missing = {"fumi_core_build_info", "fumi_edge_build_info", "python_info"}
    missing |= {"process_start_time_seconds", "process_virtual_memory_bytes"}
    assert {name for name in families if name not in asked} == missing


def test_the_checker_finds_what_is_wrong(metrics: Metrics) -> None:
    assert list(wrong("fumi_edge_nothing > 0", metrics)) == ["fumi_edge_nothing"]
    assert list(wrong("instance:fumi_edge_nothing:sum", metrics)) == ["instance:fumi_edge_nothing:sum"]
    assert list(wrong('fumi_edge_starttls_total{outcome="injection"}', metrics)) == ["fumi_edge_starttls_total{outcome}"]
    assert list(wrong('up{job="fumi"}', metrics)) == ['up{job="fumi"}']
    assert list(wrong("sum by (verb) (fumi_core_commands_total)", metrics)) == ["verb"]


def test_the_dashboard_can_be_imported_and_nothing_on_it_overlaps() -> None:
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells
    for panel in PANELS:
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["description"]
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(panel)))
        assert used <= variables | {"__rate_interval", "labels", "value"}, panel["title"]


def test_promtool_finds_nothing_wrong(programs: Programs, tmp_path: Path) -> None:
    for file in ("prometheus.yml", "containers.yml"):
        assert "SUCCESS" in programs.run("promtool", "check", "config", OPS / "prometheus" / file)
    assert f"{RULES.count('expr:')} rules found" in programs.run("promtool", "check", "rules", OPS / "prometheus" / "rules.yml")
    # Grafana's queries are PromQL once its variables have values.
    lines = [re.sub(r"\$__rate_interval", "5m", expression).replace("$", "") for _, expression, _ in QUERIES]
    panels = [{"record": f"panel:{number}", "expr": line} for number, line in enumerate(lines)]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": panels}]}))
    assert f"{len(lines)} rules found" in programs.run("promtool", "check", "rules", tmp_path / "panels.yml")


def test_promtool_finds_nothing_wrong_with_what_is_served(both: Both, certificate: CertificateFiles, programs: Programs) -> None:
    send_known_mail(both, certificate[0])
    for address in (both.edge, both.core):
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
            assert programs.run("promtool", "check", "metrics", given=answer.read()) == ""


def test_every_alert_fires_when_it_should_and_not_otherwise(programs: Programs) -> None:
    text = (OPS / "prometheus" / "rules_test.yml").read_text()
    for alert in ALERTS:
        cases = re.findall(rf"alertname: {alert}\n +exp_alerts:( \[\])?", text)
        assert "" in cases, f"{alert} never comes"
        assert " []" in cases, f"{alert} never stays away"
    assert "SUCCESS" in programs.run("promtool", "test", "rules", OPS / "prometheus" / "rules_test.yml")


def test_a_threshold_that_is_moved_fails_the_tests_of_its_alert(programs: Programs, tmp_path: Path) -> None:
    moved = [("0.8 * fumi_edge", "0.7 * fumi_edge"), ("< 3 * 86400", "< 1 * 86400"), ('command="MAIL"', 'command="RCPT"')]
    moved += [(', code!="503"', "")]
    for before, after in moved:
        assert before in RULES
        (tmp_path / "rules.yml").write_text(RULES.replace(before, after))
        (tmp_path / "rules_test.yml").write_text((OPS / "prometheus" / "rules_test.yml").read_text())
        assert "FAILED" in programs.run("promtool", "test", "rules", tmp_path / "rules_test.yml", status=1)


@pytest.fixture
def prometheus(programs: Programs, both: Both) -> Prometheus:
    """A real one, by the configuration in ops/ but for ports and intervals, that has scraped both programs."""
    text = (OPS / "prometheus" / "prometheus.yml").read_text().replace("15s", "1s")
    text = text.replace("127.0.0.1:9465", both.edge).replace("127.0.0.1:9525", both.core)
    prometheus = Prometheus.start(programs, text, RULES)
    until(lambda: prometheus.ask("sum(up)") == 2, "a scrape of both programs")
    return prometheus


MESSAGE = "From: a@example.com\r\nSubject: known\r\n\r\n" + "x" * 60 + "\r\n"


def send_known_mail(both: Both, certificate: Path) -> None:
    """Ten connections, whose every count is known; see the test."""
    context = ssl.create_default_context(cafile=str(certificate))
    for _ in range(3):
        with smtplib.SMTP_SSL("127.0.0.1", both.tls_port, context=context) as smtp:
            smtp.sendmail("a@example.com", ["b@example.org"], MESSAGE)
    for _ in range(2):
        with smtplib.SMTP("127.0.0.1", both.starttls_port) as smtp:
            smtp.starttls(context=context)
            smtp.sendmail("a@example.com", ["b@example.org"], MESSAGE)
    with smtplib.SMTP("127.0.0.1", both.starttls_port) as smtp:
        smtp.sendmail("a@example.com", ["b@example.org"], MESSAGE)
    with smtplib.SMTP("127.0.0.1", both.starttls_port) as smtp:
        smtp.ehlo()
        smtp.mail("a@example.com")
        for name in ("one", "two"):
            assert smtp.rcpt(f"{name}@elsewhere.example")[0] == 550
    with smtplib.SMTP_SSL("127.0.0.1", both.tls_port, context=context) as smtp:
        smtp.ehlo()
        for password, code in (*[("wrong", 535)] * 4, ("secret", 235)):
            assert smtp.docmd("AUTH", "PLAIN " + base64.b64encode(f"\0joe\0{password}".encode()).decode())[0] == code
    assert "554" in raw(both.starttls_port, b"EHLO x\r\n", b"STARTTLS\r\nMAIL FROM:<evil@example.com>\r\n")
    raw(both.tls_port, b"this is no TLS\r\n")


def raw(port: int, *pieces: bytes) -> str:
    """What is answered to these, each said after an answer (but the first, on a port that waits for the client)."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        for piece in pieces:
            if len(pieces) > 1:
                sock.recv(4096)
            sock.sendall(piece)
        while data := sock.recv(4096):
            said += data
        return said.decode("latin-1")


def test_prometheus_says_what_was_sent(
    both: Both, prometheus: Prometheus, programs: Programs, certificate: CertificateFiles, until_scraped: Callable[..., None]
) -> None:
    send_known_mail(both, certificate[0])
    until(lambda: "fumi_edge_session_seconds_count 10.0\n" in both.read(), "the end of all connections")
    until_scraped(prometheus, time.time())
    expires = ssl.cert_time_to_seconds(
        programs.run("openssl", "x509", "-noout", "-enddate", "-in", certificate[0]).strip().partition("=")[2]
    )
    expected = {
        "sum(fumi_edge_connections_total)": 10,
        "sum(fumi_edge_connections_active)": 0,
        'sum(fumi_edge_handshakes_total{result="ok"})': 6,
        'sum(fumi_edge_handshakes_total{result="protocol"})': 1,
        'fumi_edge_starttls_total{result="upgraded"}': 2,
        'fumi_edge_starttls_total{result="plaintext"}': 2,
        'fumi_edge_starttls_total{result="injection"}': 1,
        'sum(fumi_edge_tls_sessions_total{version="TLSv1.3"})': 6,
        "fumi_edge_backend_up": 1,
        "fumi_edge_certificate_not_after_timestamp_seconds": expires,
        'fumi_core_messages_total{result="accepted"}': 6,
        'fumi_core_deliveries_total{target="maildir", result="ok"}': 6,
        "fumi_core_message_bytes_sum": 6 * len(MESSAGE),
        'fumi_core_sessions_total{secure="true", tls_version="TLSv1.3"}': 6,
        'fumi_core_auth_total{method="PLAIN", result="failed"}': 4,
        'fumi_core_auth_total{method="PLAIN", result="ok"}': 1,
        'fumi_core_replies_total{code="550"}': 2,
        'fumi_core_commands_total{command="DATA"}': 6,
        "fumi_edge_connections_limit": 100,
        'sum(process_open_fds{job="fumi-edge"} < process_max_fds) > bool 0': 1,
        'sum(process_resident_memory_bytes{job="fumi-core"}) > bool 0': 1,
    }
    answers: dict[str, float | None] = {}

    def all_there() -> bool:
        answers.update({query: prometheus.ask(query) for query in expected})
        return answers == expected

    # A scrape that was late, on a busy machine, is one that failed, and there is nothing until the next.
    with contextlib.suppress(AssertionError):
        until(all_there, "all that was sent")
    assert answers == expected
    firing = 'ALERTS{alertname="FumiInjections", alertstate="firing"}'
    until(lambda: prometheus.ask(firing) == 1, "the alert")

    def healths() -> set[str]:
        return {each["health"] for group in prometheus.get("rules")["groups"] for each in group["rules"]}

    until(lambda: healths() == {"ok"}, "an evaluation of all")


@pytest.fixture
def until_scraped(programs: Programs) -> Callable[[Prometheus, float], None]:
    """Waits until Prometheus has from both programs what they served after that time."""

    def wait(prometheus: Prometheus, after: float) -> None:
        until(lambda: (prometheus.ask("min(timestamp(up))") or 0) > after, "a scrape")

    return wait
