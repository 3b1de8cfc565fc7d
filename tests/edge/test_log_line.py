"""The one line that each connection leaves in the log, whatever ended it: its fields, and the reason.

What every line must have is in ``ALWAYS``; each function below says what its line has besides. A text line has the same fields.
"""

from __future__ import annotations

import contextlib
import re
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

import fumi_edge
from fumi_core.proxy_protocol import ProxyHeader
from fumi_edge.connection.ends import End
from fumi_edge.connection.tunnel import LINGER_SECONDS
from tests.edge.backends import Backend, Handler, StartBackend, smtp
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.peer import Peer
from tests.support.starter import BIN
from tests.support.waiting import until

ALWAYS = {
    "time",
    "level",
    "logger",
    "event",
    "id",
    "client_ip",
    "client_port",
    "listener",
    "bytes_in",
    "bytes_out",
    "seconds",
    "reason",
}
TLS = {"tls", "cipher", "sni"}
BANNER, READY = len(b"220 backend.test ESMTP\r\n"), len(b"220 2.0.0 Ready to start TLS\r\n")


class Scene:
    """One backend, the program before it, and clients."""

    backend: Backend
    program: Program

    def __init__(self, backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
        self._start_backend, self._edge, self._clients = backend, edge, clients
        self.upgrade = clients.upgrade

    def start(self, *flags: str, handler: Handler = smtp) -> None:
        self.backend = self._start_backend(handler)
        self.program = self._edge("--log-level", "debug", *flags, backend=self.backend)

    def over_tls(self) -> Peer:
        client = self._clients.tls(self.program.tls_port)
        assert client.line()
        return client

    def tls_port(self) -> Peer:
        return self._clients.plain(self.program.tls_port)

    def starttls_port(self) -> Peer:
        return self._clients.plain(self.program.starttls_port)


Provoked = tuple[Peer, dict[str, object]]
"""The client whose connection ends, and what its line must say."""
Provoke = Callable[[Scene], Provoked]
ENDS: dict[str, ParameterSet] = {}
"""By the reason in the log: a function that makes it happen, and what the line has besides ``ALWAYS``."""


def end(reason: str, *besides: str, marks: Sequence[pytest.MarkDecorator] = ()) -> Callable[[Provoke], Provoke]:
    def keep(provoke: Provoke) -> Provoke:
        ENDS[reason] = pytest.param(reason, provoke, set(besides), id=reason, marks=marks)
        return provoke

    return keep


@pytest.fixture
def scene(backend: StartBackend, edge: StartEdge, clients: Clients) -> Scene:
    return Scene(backend, edge, clients)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_client_that_sends_nothing_leaves_no_line_and_is_no_failure(
    backend: StartBackend, edge: StartEdge, clients: Clients, balanced: bool
) -> None:
    """Somebody checks the port, and hangs up, breaks off or waits."""
    server = backend()
    accept = ("--accept-proxy",) if balanced else ()
    header = ProxyHeader(1, "PROXY", "TCP4", ("192.0.2.1", 1), ("192.0.2.2", 2)).to_bytes() if balanced else b""
    program = edge("--handshake-timeout", "0.3", "--idle-timeout", "0.5", *accept, backend=server)
    ports = (program.tls_port, program.starttls_port)

    def active() -> float:
        listeners = [f"127.0.0.1:{port}" for port in ports]
        return sum(program.metric("fumi_edge_connections_active", listener=listener) for listener in listeners)

    for port in ports:
        for leave in ("close", "reset", "rest"):
            client = clients.plain(port)
            client.say(header)
            getattr(client, leave)()
            client.close()
    until(lambda: active() == 0, "the end of them")
    tls = f"127.0.0.1:{program.tls_port}"
    for result in ("reset", "timeout", "protocol"):
        assert program.metric("fumi_edge_handshakes_total", listener=tls, result=result) == 0
    for result in ("refused", "plaintext"):
        assert program.metric("fumi_edge_starttls_total", result=result) == 0
    assert program.metric("fumi_edge_connections_total", listener=tls) == 3
    assert program.metric("fumi_edge_rejected_total", reason="proxy_header") == 0
    # One that did begin is worth a line.
    client = clients.plain(program.tls_port)
    client.say(header + b"\x16\x03\x01")
    client.end()
    client.rest()
    client.close()
    assert [entry["reason"] for entry in program.ended()] == ["handshake_reset"]
    assert program.metric("fumi_edge_handshakes_total", listener=tls, result="reset") == 1


@end("client_closed", *TLS, "backend")
def a_client_leaves_without_quit(scene: Scene) -> Provoked:
    scene.start()
    client = scene.over_tls()
    with contextlib.suppress(OSError):
        client.tls.unwrap()
    client.close()
    return client, {"bytes_in": 0, "bytes_out": BANNER}


@end("backend_closed", *TLS, "backend")
def a_client_says_quit(scene: Scene) -> Provoked:
    scene.start()
    client = scene.over_tls()
    client.ask(b"QUIT\r\n")
    assert client.rest() == b""
    return client, {"bytes_in": 6, "bytes_out": BANNER + len(b"221 2.0.0 bye\r\n"), "level": "info"}


@end("client_reset", *TLS, "backend")
def a_client_breaks_off(scene: Scene) -> Provoked:
    scene.start()
    client = scene.over_tls()
    client.reset()
    return client, {}


@end("backend_reset", *TLS, "backend")
def a_backend_breaks_off(scene: Scene) -> Provoked:
    def handler(peer: Peer) -> None:
        peer.say(b"220 hello\r\n")
        peer.line()
        peer.reset()

    scene.start(handler=handler)
    client = scene.over_tls()
    client.say(b"EHLO me\r\n")
    assert client.rest() == b""
    return client, {"bytes_in": 9}


@end("idle_timeout", *TLS, "backend")
def nobody_says_anything(scene: Scene) -> Provoked:
    scene.start("--idle-timeout", "1")
    client = scene.over_tls()
    assert client.rest() == b""
    return client, {}


@end("linger", *TLS, "backend", marks=[pytest.mark.long])
def a_client_does_not_end_what_the_backend_has_ended(scene: Scene) -> Provoked:
    scene.start(handler=lambda peer: peer.say(b"220 hello\r\n"))
    client = scene.over_tls()
    deadline = time.monotonic() + 4 * LINGER_SECONDS
    while not scene.program.events("connection ended"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return client, {}


@end("handshake_timeout", "error")
def a_client_does_not_begin_tls(scene: Scene) -> Provoked:
    scene.start("--handshake-timeout", "0.2")
    client = scene.tls_port()
    assert client.rest() == b""
    return client, {"bytes_in": 0, "bytes_out": 0}


@end("handshake_protocol", "error")
def a_client_does_not_speak_tls(scene: Scene) -> Provoked:
    scene.start()
    client = scene.tls_port()
    client.say(b"EHLO me\r\n")
    client.rest()
    return client, {}


@end("handshake_certificate", "sni", "error")
def a_client_distrusts_the_certificate(scene: Scene) -> Provoked:
    scene.start()
    client = scene.tls_port()
    with pytest.raises(ssl.SSLCertVerificationError):
        scene.upgrade(client, context=ssl.create_default_context())
    return client, {"sni": "localhost"}


@end("handshake_reset", "error")
def a_client_leaves_in_the_handshake(scene: Scene) -> Provoked:
    scene.start()
    client = scene.tls_port()
    client.close()
    return client, {}


@end("no_backend", "error", *TLS)
def there_is_no_backend(scene: Scene) -> Provoked:
    scene.start()
    scene.backend.close()
    client = scene.over_tls()
    assert client.rest() == b""
    return client, {"bytes_out": len(b"421 4.3.2 Service not available, closing connection\r\n")}


@end("backend_refused", *TLS, "backend", "error")
def a_backend_refuses_after_the_upgrade(scene: Scene) -> Provoked:
    banners = [b"554 5.7.1 go away\r\n", b"220 hello\r\n"]

    def handler(peer: Peer) -> None:
        peer.say(banners.pop())
        peer.rest()

    scene.start(handler=handler)
    client = scene.starttls_port()
    client.line()
    assert client.ask(b"STARTTLS\r\n")[0].startswith(b"220")
    client = scene.upgrade(client)
    assert client.ask(b"EHLO me\r\n") == [b"554 5.7.1 go away\r\n"]
    return client, {"error": "554 5.7.1 go away"}


@end("injection", "backend")
def a_client_says_more_behind_starttls(scene: Scene) -> Provoked:
    scene.start()
    client = scene.starttls_port()
    client.line()
    client.say(b"STARTTLS\r\nRSET\r\n")
    client.rest()
    return client, {"bytes_in": 16}


@end("not_smtp", "backend")
def a_client_begins_tls_on_a_starttls_port(scene: Scene) -> Provoked:
    scene.start()
    client = scene.starttls_port()
    client.say(b"\x16\x03\x01\x00\x05hello")
    client.rest()
    return client, {"bytes_in": 10}


@end("errors", "backend")
def a_client_never_says_starttls(scene: Scene) -> Provoked:
    scene.start("--require-tls")
    client = scene.starttls_port()
    client.line()
    client.say(b"MAIL FROM:<a@b.example>\r\n" * 30)
    client.rest()
    return client, {}


@end("proxy_header", "error")
def a_balancer_sends_no_header(scene: Scene) -> Provoked:
    scene.start("--accept-proxy")
    client = scene.starttls_port()
    client.say(b"EHLO me\r\n")
    return client, {"level": "info"}


def one_too_many(scene: Scene, *flags: str) -> Provoked:
    scene.start("--accept-proxy", *flags)
    for _ in range(2):
        client = scene.starttls_port()
        client.say(b"PROXY TCP4 192.0.2.1 192.0.2.2 7 25\r\n")
        client.line()
    # What the flood's own line says is not said again unless asked for.
    assert [entry["client_ip"] for entry in until(lambda: scene.program.events("rejected"))] == ["192.0.2.1"]
    return client, {"client_ip": "192.0.2.1", "client_port": 7, "level": "debug"}


@end("max_clients_per_ip")
def a_balancers_client_has_too_many_connections(scene: Scene) -> Provoked:
    return one_too_many(scene, "--max-clients-per-ip", "1")


@end("rate")
def a_balancers_client_comes_too_often(scene: Scene) -> Provoked:
    return one_too_many(scene, "--rate-per-ip", "1/h")


@end("shutdown", *TLS, "backend")
def the_edge_stops(scene: Scene) -> Provoked:
    scene.start("--drain-timeout", "0.1")
    client = scene.over_tls()
    scene.program.process.send_signal(signal.SIGTERM)
    assert client.rest() == b""
    return client, {}


@pytest.mark.parametrize(("reason", "provoke", "besides"), ENDS.values())
def test_the_end_of_a_connection_is_one_line_that_says_all(
    scene: Scene, reason: str, provoke: Provoke, besides: set[str]
) -> None:
    client, facts = provoke(scene)
    client.close()
    (line,) = [entry for entry in scene.program.ended() if entry["reason"] == reason]
    assert set(line) == ALWAYS | besides
    assert line["listener"] in (f"127.0.0.1:{port}" for port in (scene.program.tls_port, scene.program.starttls_port))
    assert line["seconds"] >= 0
    assert {name: line[name] for name in facts} == facts
    if "tls" in besides:
        assert (line["tls"], line["cipher"][:4], line["sni"]) == ("TLSv1.3", "TLS_", "localhost")
    if "backend" in besides:
        told = scene.backend.peers[-1]
        assert (line["id"], line["backend"]) == (told.unique_id, scene.backend.address)
        assert (line["client_ip"], line["client_port"]) == told.header.source


def test_the_readme_explains_every_reason() -> None:
    section = (Path(fumi_edge.__file__).with_name("README.md")).read_text().partition("\n## The log\n")[2]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    explained = re.findall(r"`(\w+)`", "".join(rows))
    assert [*explained, End.ERROR] == list(End)  # a bug has a sentence of its own
    assert sorted(explained) == sorted(ENDS)


def test_a_rejected_connection_is_logged_too(scene: Scene) -> None:
    scene.start("--max-clients", "1")
    scene.over_tls()
    assert scene.starttls_port().rest()
    (line,) = until(lambda: scene.program.events("rejected"))
    assert set(line) == {"time", "level", "logger", "event", "client_ip", "listener", "reason"}
    assert (line["client_ip"], line["reason"]) == ("127.0.0.1", "max_clients")


def test_a_text_line_has_the_fields_of_the_json_line(
    backend: StartBackend, certificate: CertificateFiles, clients: Clients, tmp_path: Path
) -> None:
    cert, key = certificate
    log = tmp_path / "log"
    command: list[str | Path] = [BIN / "fumi-edge", "--cert", cert, "--key", key, "--backend", backend().address]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--listen", "127.0.0.1:0", "--health-interval", "0"], stderr=output)
    try:
        until(lambda: "listening" in log.read_text(), "the start")
        (port,) = re.findall(r"listener=127\.0\.0\.1:(\d+)", log.read_text())
        client = clients.tls(int(port))
        client.line()
        client.ask(b"QUIT\r\n")
        assert client.rest() == b""
        client.close()
        until(lambda: "connection ended" in log.read_text(), "the line")
    finally:
        process.kill()
        process.wait()
    line = log.read_text().splitlines()[-1]
    assert re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO fumi\.edge connection ended ", line)
    named = set(re.findall(r" (\w+)=", line))
    assert named == (ALWAYS | TLS | {"backend"}) - {"time", "level", "logger", "event"}


def test_a_server_name_cannot_forge_a_line(scene: Scene, clients: Clients) -> None:
    """A name that looks like a field, in a handshake that fails: it arrives quoted, in its own field."""
    scene.start("--client-ca", str(clients.authority), "--client-cert", "required")
    name = 'a.example id=1 "\n2026-01-31T12:00:00.000Z'
    with contextlib.suppress(OSError):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        scene.upgrade(scene.tls_port(), name, context).line()
    (line,) = scene.program.ended()
    assert line == line | {"sni": name, "reason": "handshake_certificate"}
