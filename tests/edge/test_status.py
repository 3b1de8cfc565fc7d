"""The status page of the edge, as the real program serves it."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import signal
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest

from fumi_core.runtime.overview import Worker
from fumi_core.runtime.scoreboard import WorkerState
from fumi_core.status.history import INTERVAL
from fumi_core.status.markup import document
from fumi_edge.status.certificates import certificates_table, reported
from tests.edge.backends import Flapping, StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.support.certificates import CertificateFiles, MakeCertificate
from tests.support.peer import Peer
from tests.support.ports import free_port
from tests.support.status_page import Reader, read_json, read_page
from tests.support.waiting import until


def look(program: Program, path: str = "/") -> tuple[Reader, Message]:
    return read_page(program.metrics_port, path)


@pytest.fixture
def lasting(make_certificate: MakeCertificate) -> tuple[str, Path, str, Path]:
    """Flags of a certificate that does not expire soon."""
    cert, key = make_certificate("lasting", options=("-days", "90"))
    return "--cert", cert, "--key", key


def test_it_counts_what_was_done(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge(backend=backend())
    ways: list[tuple[Callable[[int], Peer], int, bytes]] = [(clients.tls, program.tls_port, b"QUIT\r\n")] * 3
    ways += [(clients.plain, program.tls_port, b"EHLO me\r\n"), (clients.plain, program.starttls_port, b"QUIT\r\n")]
    ways += [(clients.plain, program.starttls_port, b"STARTTLS\r\nEHLO me\r\n")]
    for way, port, words in ways:
        client = way(port)
        client.ask(words)
        client.close()
    client = clients.plain(program.starttls_port)
    client.line()
    client.ask(b"STARTTLS\r\n")
    client = clients.upgrade(client)
    client.ask(b"QUIT\r\n")
    client.close()
    program.ended(7)
    held = clients.tls(program.tls_port)
    held.line()
    page, _ = look(program)
    tls, starttls = f"127.0.0.1:{program.tls_port}", f"127.0.0.1:{program.starttls_port}"
    mode, _, still_open, _, came, failed = page.row("Listeners", tls)
    assert (mode, still_open, came, failed) == ("TLS", "1", "5", "20 %")
    mode, _, still_open, _, came, failed = page.row("Listeners", starttls)
    assert (mode, still_open, came, failed) == ("STARTTLS", "0", "3", "0 %")
    assert [(row[0], row[2]) for row in page.tables["STARTTLS ports"][1:]] == [
        ("upgraded", "1"),
        ("plaintext", "1"),
        ("injection", "1"),
    ]
    assert "0: refused" in page.words
    assert page.row("TLS handshakes", "ok")[1:] == ["5", "83 %"]
    assert page.row("Rejected", "injection")[1:] == ["1", "100 %"]
    assert page.row("TLS sessions", "TLSv1.3 TLS_AES_256_GCM_SHA384")[1:] == ["5", "100 %"]
    assert page.tables["Durations"][0] == ["Duration", "p50", "p95", "p99"]
    assert all(each.endswith("s") for row in page.tables["Durations"][1:] for each in row[1:])


def test_a_backend_has_its_connections_its_checks_and_its_errors_with_their_times(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    server = backend()
    program = edge("--backend", "127.0.0.1:9", "--health-interval", "0.1", backend=server)
    until(lambda: look(program)[0].row("Backends", "127.0.0.1:9")[0].startswith("down"), "the verdict")
    until(lambda: program.fetch("/readyz")[0] == 200, "the verdict on the other")
    clients.tls(program.tls_port).line()
    page, _ = look(program)
    state, current, total, _, _, _, check, errors = page.row("Backends", server.address)
    assert (state, current, total, errors) == ("up", "1", "1", "none")
    assert re.fullmatch(r"[\d:]{8}: ok", check)
    state, current, total, _, _, _, check, errors = page.row("Backends", "127.0.0.1:9")
    assert re.fullmatch(r"down since [\d:]{8} \(\d+ s\)", state)
    assert (current, total) == ("0", "0")
    assert re.fullmatch(r"[\d:]{8}: Connection refused", check)
    assert re.fullmatch(r"[\d,]+ refused; last at [\d:]{8}: Connection refused", errors)


def test_without_health_checks_it_says_so(backend: StartBackend, edge: StartEdge) -> None:
    server = backend()
    page, _ = look(edge(backend=server))
    assert page.row("Backends", server.address)[6] == "checks are off"


def test_it_is_degraded_while_a_backend_is_down_and_not_ready_when_all_are(
    backend: StartBackend, edge: StartEdge, lasting: tuple[str, Path, str, Path]
) -> None:
    server = Flapping()
    program = edge("--backend", "127.0.0.1:9", "--health-interval", "0.1", backend=server.address, certs=lasting)
    until(lambda: look(program)[0].state == "not ready", "the verdict on both")
    reason = program.fetch("/readyz")[1].strip()
    assert reason == f"backend {server.address}: Connection refused; backend 127.0.0.1:9: Connection refused"
    page, _ = look(program)
    assert reason in page.words
    assert [word for word in page.words if word.startswith("NOT READY: ")]
    server.appear()
    until(lambda: look(program)[0].state == "degraded", "the first backend")
    page, _ = look(program)
    assert "1 of 2 backends down" in page.words
    assert [word for word in page.words if word.startswith("DEGRADED: ")]
    assert program.fetch("/readyz") == (200, "ready\n")
    server.vanish()


def test_it_is_ready_while_all_is_well(backend: StartBackend, edge: StartEdge, lasting: tuple[str, Path, str, Path]) -> None:
    program = edge(backend=backend(), certs=lasting)
    page, _ = look(program)
    assert page.state == "ready"
    assert read_json(program.metrics_port)["reasons"] == []


def test_it_is_degraded_when_a_certificate_expires_soon(
    backend: StartBackend, edge: StartEdge, make_certificate: MakeCertificate
) -> None:
    cert, key = make_certificate("mail.example.com", options=("-days", "2"))
    page, _ = look(edge(backend=backend(), certs=("--cert", cert, "--key", key)))
    assert page.state == "degraded"
    assert "mail.example.com expires in 1 day" in page.words


def test_a_certificate_has_its_names_issuer_file_and_when_it_was_loaded(
    backend: StartBackend, edge: StartEdge, make_certificate: MakeCertificate
) -> None:
    cert, key = make_certificate("a.example", "b.example", options=("-days", "90"))
    page, _ = look(edge(backend=backend(), certs=("--cert", cert, "--key", key)))
    expires, names, file, issuer, kind, loaded = page.row("Certificates", "a.example")
    assert expires.startswith("in 89 days (20")
    assert (names, file, issuer, kind) == ("a.example, b.example", str(cert), "a.example", "ECDSA")
    assert re.fullmatch(r"[\d:]{8}", loaded)


def test_each_listener_names_its_backends(backend: StartBackend, edge: StartEdge) -> None:
    one, other = backend(), backend()
    program = edge("--backend", other.address, backend=one)
    page, _ = look(program)
    assert page.row("Listeners", f"127.0.0.1:{program.tls_port}")[1] == f"{one.address}, {other.address}"


def test_it_needs_no_script_and_nothing_from_elsewhere(backend: StartBackend, edge: StartEdge) -> None:
    page, headers = look(edge(backend=backend()))
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    directives = dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; "))
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert directives.pop("style-src") == f"'sha256-{digest}'"
    assert set(directives.values()) == {"'none'"}
    assert directives.keys() >= {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "form", "object", "use", "image"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "src")]
    assert page.links == {"/?refresh=0", "/?clients=1", "/metrics", "/readyz", "/status.json"}
    assert "url(" not in page.style
    assert "@import" not in page.style


def test_a_page_may_stay_as_it_is(backend: StartBackend, edge: StartEdge) -> None:
    program = edge(backend=backend())
    refreshing, _ = look(program)
    staying, _ = look(program, "/?refresh=0")
    refresh = ("meta", {"http-equiv": "refresh", "content": f"{INTERVAL:.0f}"})
    assert refresh in refreshing.tags
    assert refresh not in staying.tags
    assert "/" in staying.links
    both, _ = look(program, "/?refresh=0&clients=1")
    assert {"/?clients=1", "/?refresh=0"} <= both.links


def test_names_with_markup_in_them_are_text(backend: StartBackend, edge: StartEdge, tmp_path: Path) -> None:
    path = str(tmp_path / "<b>&amp;\"'")
    program = edge(backend=backend(path=path))
    page, _ = look(program)
    assert page.row("Backends", f"unix:{path}")[0] == "up"
    assert not [tag for tag, _ in page.tags if tag == "b" and "unix" in tag]
    assert f"connect time of unix:{path}" in page.labels


def test_text_of_backends_is_escaped(backend: StartBackend, edge: StartEdge) -> None:
    def handler(peer: Peer) -> None:
        peer.say(b"554 <script>alert(1)</script>\r\n")

    server = backend(handler)
    program = edge("--health-interval", "0.05", backend=server)
    until(lambda: "alert(1)" in look(program)[0].row("Backends", server.address)[6], "the check")
    page, _ = look(program)
    assert "script" not in {tag for tag, _ in page.tags}
    assert read_json(program.metrics_port)["backends"][0]["last_check"]["error"].startswith("answered '554 <script>")


def test_events_do_not_identify_clients_unless_requested(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--max-clients", "1", backend=backend())
    clients.tls(program.tls_port).line()
    assert clients.plain(program.starttls_port).line().startswith(b"421 ")
    until(lambda: program.events("rejected"), "the log")
    title = "Last 50 events: errors, rejections, reloads, restarts"

    def rejections(path: str) -> list[list[str]]:
        return [row for row in look(program, path)[0].tables[title] if row[2] == "rejected"]

    (row,) = rejections("/")
    assert row[1] == "info"
    assert row[4] == f"listener 127.0.0.1:{program.starttls_port}, reason max_clients"
    (row,) = rejections("/?clients=1")
    assert row[4] == f"client_ip 127.0.0.1, listener 127.0.0.1:{program.starttls_port}, reason max_clients"
    port = program.metrics_port
    for query, told in (("", False), ("?clients=1", True)):
        event = next(each for each in read_json(port, query)["events"] if each["event"] == "rejected")
        assert ("client_ip" in event["fields"]) is told


def test_the_json_has_the_facts_of_the_page(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend()
    program = edge("--max-clients", "7", "--rate-per-ip", "600/m", backend=server)
    clients.tls(program.tls_port).line()
    page, _ = look(program)
    facts = read_json(program.metrics_port)
    assert (facts["program"], facts["pid"], facts["state"]) == ("fumi-edge", program.process.pid, page.state)
    assert {f"PID {facts['pid']}", "1 worker"} <= set(page.words)
    assert [each["address"] for each in facts["backends"]] == [server.address]
    assert (facts["backends"][0]["open"], facts["backends"][0]["total"]) == (1, 1)
    assert facts["certificates"][0]["names"] == ["localhost", "127.0.0.1"]
    assert [each["mode"] for each in facts["listeners"]] == ["TLS", "STARTTLS"]
    assert facts["limits"]["--max-clients"] == 7
    assert facts["limits"]["--rate-per-ip (of each worker)"] == "600/min"
    assert page.row("Limits", "--rate-per-ip (of each worker)") == ["600/min"]
    assert facts["workers"][0]["connections"] == 1
    assert facts["plots"].keys() >= {"connections", "connection_rate", "traffic"}
    assert {each["name"]: each["total"] for each in facts["handshakes"]}["ok"] == 1


def test_workers_are_one_edge(
    backend: StartBackend, edge: StartEdge, clients: Clients, lasting: tuple[str, Path, str, Path]
) -> None:
    server = backend()
    program = edge("--workers", "2", "--health-interval", "0.1", "--backend", "127.0.0.1:9", backend=server, certs=lasting)
    port = program.metrics_port
    until(lambda: program.fetch("/readyz")[0] == 200 and len(program.workers()) == 2, "the workers")
    held = [clients.plain(program.starttls_port) for _ in range(6)]
    for client in held:
        client.line()
    name = f"127.0.0.1:{program.starttls_port}"
    until(lambda: look(program)[0].row("Listeners", name)[4] == "6", "the sum")
    until(lambda: [each["open"] for each in read_json(port)["backends"]] == [6, 0], "the connections to the backend")
    facts = read_json(port)
    assert facts["pid"] == program.process.pid
    assert {each["pid"] for each in facts["workers"]} == program.workers()
    assert sum(each["connections"] for each in facts["workers"]) == 6
    until(lambda: read_json(port)["backends"][1]["state"] == "down", "the verdict of both workers")
    assert read_json(port)["reasons"] == ["1 of 2 backends down"]


def test_events_of_workers_and_master_are_in_one_list(backend: StartBackend, edge: StartEdge) -> None:
    program = edge("--workers", "2", backend=backend())
    port = program.metrics_port
    until(lambda: program.fetch("/readyz")[0] == 200 and len(program.workers()) == 2, "the workers")
    os.kill(min(program.workers()), signal.SIGKILL)

    def events(name: str) -> list[dict[str, object]]:
        return [each for each in read_json(port)["events"] if each["event"] == name]

    until(lambda: events("worker died"), "the master's event")
    (died,) = events("worker died")
    assert isinstance(died["fields"], dict)
    assert died["fields"]["reason"] == "SIGKILL"
    program.process.send_signal(signal.SIGHUP)
    until(lambda: events("reloaded"), "the reload")
    assert len(events("starting")) == 1


def test_it_remembers_the_last_minutes(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge(backend=backend())
    client = clients.tls(program.tls_port)
    client.line()
    until(lambda: [label for label in look(program)[0].labels if label.startswith("Current connections: 1")], "a look")
    wanted = re.compile(r"Current connections: 1(?: of [\d,]+)?, maximum 1 in the last 15 minutes")
    until(lambda: [label for label in look(program)[0].labels if wanted.fullmatch(label)], "a second look")
    assert "max 1" in look(program)[0].words
    assert {"-15 min", "-10 min", "-5 min", "now"} <= set(look(program)[0].words)


def test_listeners_with_settings_of_their_own_show_them(
    backend: StartBackend, make_certificate: MakeCertificate, tmp_path: Path
) -> None:
    one, other = backend(), backend()
    (cert, key), (own_cert, own_key) = make_certificate("mx.example"), make_certificate("mail.example")
    ports = free_port(), free_port()
    config = tmp_path / "edge.toml"
    config.write_text(f"""
[edge]
cert = "{cert}"
key = "{key}"
backend = "{one.address}"
health-interval = 0
[[edge.listener]]
address = "127.0.0.1:{ports[0]}"
mode = "starttls"
[[edge.listener]]
address = "127.0.0.1:{ports[1]}"
mode = "tls"
backend = ["{other.address}"]
cert = "{own_cert}"
key = "{own_key}"
rate-per-ip = "10/s"
""")
    program = Program("--config", str(config), "--metrics", "127.0.0.1:0")
    page, _ = look(program)
    first, second = (page.row("Listeners", f"127.0.0.1:{port}") for port in ports)
    assert (first[:2], first[-1]) == (["STARTTLS", one.address], "\N{EN DASH}")
    assert (second[:2], second[-1]) == (["TLS", other.address], "10/s per address")
    assert page.row("Certificates", "mx.example")[-1] == f"127.0.0.1:{ports[0]}"
    assert page.row("Certificates", "mail.example")[-1] == f"127.0.0.1:{ports[1]}"
    assert [each["address"] for each in read_json(program.metrics_port)["backends"]] == [one.address, other.address]
    program.stop()


def test_a_reload_shows_other_backends(backend: StartBackend, certificate: CertificateFiles, tmp_path: Path) -> None:
    old, new = backend(), backend()
    config = tmp_path / "edge.toml"
    config.write_text(f'backend = ["{old.address}"]')
    cert, key = map(str, certificate)
    flags = ("--workers", "2", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--health-interval", "0")
    program = Program("--config", str(config), "--cert", cert, "--key", key, *flags)
    port = program.metrics_port
    until(lambda: program.fetch("/readyz")[0] == 200 and len(program.workers()) == 2, "the workers")
    config.write_text(f'backend = ["{new.address}"]')
    program.process.send_signal(signal.SIGHUP)
    until(
        lambda: [(each["address"], each["state"]) for each in read_json(port)["backends"]] == [(new.address, "up")], "the reload"
    )
    assert read_page(port)[0].row("Listeners", f"127.0.0.1:{program.tls_port}")[1] == new.address
    program.stop()


def test_many_certificates_are_cut_to_those_that_expire_first() -> None:
    def certificate(number: int) -> dict[str, object]:
        name = f"host{number}.example"
        facts = {"name": name, "names": [name] * 9, "more_names": 3, "issuer": "CA", "file": "x.pem", "key_type": "RSA"}
        return facts | {"loaded": 0.0, "not_before": 0.0, "not_after": 9e6 - number, "served": number > 0, "listeners": None}

    worker = Worker(
        0, WorkerState.SERVING, 1, 0.0, 0, {"certificates": [certificate(at) for at in range(3)], "more_certificates": 7}
    )
    certificates, more = reported([worker, worker])
    assert [each["name"] for each in certificates] == ["host2.example", "host1.example", "host0.example"]
    text = document(certificates_table(certificates, more, 0.0).element())
    assert "and 7 more that expire later" in text
    assert text.count("host1.example</td>") == 0
    assert text.count(", host1.example and 7 more") == 1
    assert ", not in use" in text


def test_what_a_backend_says_about_a_client_is_not_on_the_page(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    """The backend gets the client's address, and its second banner may contain it."""

    def handler(peer: Peer) -> None:
        if peer.header.tls:
            peer.say(b"554-5.7.1 127.0.0.1 is blocked " + b"x" * 5000 + b"\r\n554 5.7.1 go away\r\n")
            return
        peer.say(b"220 hi\r\n")
        peer.rest()

    program = edge(backend=backend(handler))
    client = clients.plain(program.starttls_port)
    client.line()
    client.ask(b"STARTTLS\r\n")
    client = clients.upgrade(client)
    client.ask(b"EHLO me\r\n")
    client.rest()
    client.close()
    (line,) = program.ended()
    assert line["error"].startswith("554-5.7.1 127.0.0.1 is blocked")
    assert len(line["error"]) == 500
    (shown,) = read_json(program.metrics_port)["backends"]
    assert shown["last_error"]["error"] == "answered 554 instead of 220"
