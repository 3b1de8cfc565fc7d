"""The lines of both programs have the same fields: one name means one thing and has one type, whoever logs it."""

from __future__ import annotations

import ast
import contextlib
import json
import signal
import smtplib
import ssl
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.readme import ROOT
from tests.support.starter import BIN
from tests.support.waiting import until

COMMON = {"time": str, "level": str, "logger": str, "event": str}
NAMES = """
    address backend changed cipher client command deliver error event expires file from helo hint hook id last_client_ip level
    listener listeners logger message method milter mode name next_hop path proxy proxy_protocol received reason reply rejected
    sent server settings signal sni state time tls to traceback unreadable user version zone client_ip peer
"""
NUMBERS = """
    accepted backends_up bytes_in bytes_out client_port code connections count deferred files line messages pid port recipients
    recipients_rejected size transactions worker workers
"""
FIELDS: dict[str, type] = {
    **dict.fromkeys(NAMES.split(), str),
    **dict.fromkeys(NUMBERS.split(), int),
    **dict.fromkeys(("seconds", "pause"), float),
}
"""Every field, and its type in JSON."""
BOTH = {"starting", "listening", "serving metrics", "reloaded", "draining", "stopping"}
"""Events of the life of either program."""


def fields_in_the_source() -> Iterator[tuple[str, str]]:
    """(place, field) of each call that logs something with named fields."""
    for package in ("fumi_core", "fumi_edge"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                    name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                    if name in ("event", "log_event", "failure", "_log_line", "note") and node.args:
                        place = f"{path.relative_to(ROOT)}:{node.lineno}"
                        yield from ((place, each.arg) for each in node.keywords if each.arg is not None)


def test_every_field_in_the_source_has_a_type_here() -> None:
    found = list(fields_in_the_source())
    assert len(found) > 100
    assert not [(place, field) for place, field in found if field not in FIELDS]


Lines = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, certificate: CertificateFiles) -> Iterator[Lines]:
    """What both programs log from their start to their end, with mail, errors, rejections and a reload."""
    programs = Programs(tmp_path_factory.mktemp("logs"))
    try:
        yield run(programs, certificate)
    finally:
        programs.close()


def run(programs: Programs, certificate: CertificateFiles) -> Lines:
    ports = {name: free_port() for name in ("core", "core_metrics", "tls", "starttls", "edge_metrics")}
    address = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    core = ["--listen", address["core"], "--metrics", address["core_metrics"], "--domain", "example.org"]
    edge = ["--cert", str(certificate[0]), "--key", str(certificate[1]), "--backend", address["core"]]
    edge += ["--backend", "unix:missing", "--listen", address["tls"], "--starttls-listen", address["starttls"]]
    edge += ["--metrics", address["edge_metrics"], "--max-clients", "2"]
    common = ["--log-format", "json", "--log-level", "debug"]
    running = {
        "core": programs.start(BIN / "fumi-core", *common, *core, port=ports["core_metrics"], log="core"),
        "edge": programs.start(BIN / "fumi-edge", *common, *edge, port=ports["edge_metrics"], log="edge"),
    }

    def logged(name: str) -> list[dict[str, Any]]:
        text = (programs.directory / name).read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def await_event(event: str) -> None:
        """Wait until both have logged it."""
        until(lambda: all(event in [each["event"] for each in logged(name)] for name in running), event)

    context = ssl.create_default_context(cafile=str(certificate[0]))
    with smtplib.SMTP("localhost", ports["starttls"]) as client:
        client.starttls(context=context)
        client.sendmail("a@example.com", ["b@example.org"], "Subject: hello\r\n\r\nhello\r\n")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@example.com", ["b@elsewhere.example"], "Subject: hello\r\n\r\nhello\r\n")
    for process in running.values():
        process.send_signal(signal.SIGHUP)
    await_event("reloaded")
    urllib.request.urlopen(f"http://{address['edge_metrics']}/metrics", timeout=60).close()
    with contextlib.ExitStack() as stack:
        # Both wait for this message, and a third client is one too many.
        client = stack.enter_context(contextlib.closing(smtplib.SMTP_SSL("localhost", ports["tls"], context=context)))
        stack.enter_context(contextlib.closing(smtplib.SMTP("localhost", ports["starttls"])))
        with pytest.raises(smtplib.SMTPConnectError):
            smtplib.SMTP("localhost", ports["starttls"])
        client.ehlo()
        client.mail("a@example.com")
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        await_event("draining")
    assert [process.wait(60) for process in running.values()] == [0, 0]
    return {name: logged(name) for name in running}


def test_every_line_has_the_common_fields_first(lines: Lines) -> None:
    for entry in (*lines["core"], *lines["edge"]):
        assert list(entry)[:4] == list(COMMON), entry


def test_a_field_has_one_type(lines: Lines) -> None:
    assert not [
        (entry["event"], name, value)
        for entry in (*lines["core"], *lines["edge"])
        for name, value in entry.items()
        if type(value) is not FIELDS.get(name)
    ]


def test_what_both_programs_log_has_the_same_fields(lines: Lines) -> None:
    def shapes(entries: list[dict[str, Any]]) -> dict[str, set[frozenset[str]]]:
        found: dict[str, set[frozenset[str]]] = {}
        for entry in entries:
            found.setdefault(entry["event"], set()).add(frozenset(entry))
        return found

    core, edge = shapes(lines["core"]), shapes(lines["edge"])
    assert core.keys() & edge.keys() >= BOTH
    assert {name: core[name] for name in BOTH} == {name: edge[name] for name in BOTH}


def test_a_client_is_named_in_the_same_way(lines: Lines) -> None:
    (session,) = [entry for entry in lines["core"] if entry["event"] == "session ended" and entry.get("messages") == 1]
    connections = [entry for entry in lines["edge"] if entry["event"] == "connection ended"]
    (connection,) = [entry for entry in connections if entry["id"] == session["id"]]
    for field in ("id", "client_ip", "client_port", "tls"):
        assert session[field] == connection[field]
