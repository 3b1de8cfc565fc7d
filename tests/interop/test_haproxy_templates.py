"""The files of haproxy/, as they are: HAProxy accepts them, and mail comes through."""

from __future__ import annotations

import grp
import os
import pwd
import re
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.interop.starting import ClientCertificate, StartFumiCore, StartHAProxy
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.proc import connections
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

DIRECTORY = Path(__file__).parents[2] / "haproxy"
FILES = sorted(path.name for path in DIRECTORY.glob("*.cfg"))
README = (DIRECTORY / "README.md").read_text()
TEXT = "Subject: hi\r\n\r\nhi\r\n"


@pytest.fixture
def trusting(certificate: CertificateFiles) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


def send(port: int, context: ssl.SSLContext, host: str = "localhost", starttls: bool = False) -> None:
    kind = smtplib.SMTP(host, port) if starttls else smtplib.SMTP_SSL(host, port, context=context)
    with kind as smtp:
        if starttls:
            smtp.starttls(context=context)
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)


def stored(programs: Programs, name: str) -> list[Path]:
    new = programs.directory / name / "new"
    return list(new.iterdir()) if new.exists() else []


def metric(port: int, line: str) -> float:
    """The value of one line of a /metrics, 0 while there is none."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        found = re.search(rf"^{re.escape(line)} (\S+)$", response.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0


def await_metric(port: int, line: str, value: float) -> None:
    until(lambda: metric(port, line) == value, f"{line} {value}")


def await_count(path: Path, text: str, count: int) -> None:
    until(lambda: path.read_text().count(text) == count, f"{text} {count} times in {path.name}")


@pytest.mark.parametrize("name", FILES)
def test_haproxy_accepts_the_file_and_finds_nothing_to_warn_of(
    name: str, certificate: CertificateFiles, client_certificate: ClientCertificate
) -> None:
    own = {"FUMI_CERT": str(certificate[0].with_name("both.pem")), "FUMI_CLIENT_CA": str(client_certificate.ca)}
    for more in ({}, {"FUMI_NODE_2": "127.0.0.2"}, {"FUMI_NODE_2": ""}, {"FUMI_STATS": ""}):
        done = subprocess.run(
            ["haproxy", "-c", "-f", DIRECTORY / name], env={**os.environ, **own, **more}, capture_output=True, text=True
        )
        if "FUMI_STATS" in more and "Warnings were found" in done.stdout:
            # HAProxy 3.2 warns of empty words even in lines that it leaves out.
            assert (done.returncode, done.stderr.count("[WARNING]")) == (0, 1)
            continue
        # Newer ones say nothing.
        assert (done.returncode, done.stdout.replace("Configuration file is valid\n", ""), done.stderr) == (0, "", "")


def test_the_readme_has_every_file_and_every_variable_with_its_default() -> None:
    assert sorted(set(re.findall(r"`([\w-]+\.cfg)`", README))) == FILES
    used: dict[str, set[str]] = {}
    for name in FILES:
        for variable, default in re.findall(r"\$\{(FUMI_\w+)-([^}]*)\}", _settings(name)):
            used.setdefault(variable, set()).add(default)
    table = dict(re.findall(r"^\| `(FUMI_\w+)` \| `([^`]*)` \|", README, re.MULTILINE))
    assert {variable: {default} for variable, default in table.items()} == used
    without = {variable for name in FILES for variable in re.findall(r"\$\{(FUMI_\w+)\}", _settings(name))}
    assert set(re.findall(r"^\| `(FUMI_\w+)` \| \|", README, re.MULTILINE)) == without


def _settings(name: str) -> str:
    """A file without its comments."""
    return re.sub(r"^#.*", "", (DIRECTORY / name).read_text(), flags=re.MULTILINE)


def test_mail_comes_through_implicit_tls_and_checks_leave_no_trace(
    programs: Programs, haproxy: StartHAProxy, fumi_core: StartFumiCore, trusting: ssl.SSLContext
) -> None:
    metrics, port = free_port(), free_port()
    core, _ = fumi_core("--metrics", f"127.0.0.1:{metrics}")
    haproxy("implicit-tls.cfg", port, LISTEN=f"127.0.0.1:{port}", BACKEND=f"127.0.0.1:{core}", HEALTH_INTERVAL="50ms")
    checks = 'fumi_core_proxy_headers_total{result="ok",version="2"}'
    until(lambda: metric(metrics, checks) >= 3, "three health checks")
    send(port, trusting)
    (message,) = stored(programs, "core")
    assert re.search(rb"using TLSv1\.3 with cipher \w+.*\sESMTPS id \S+", message.read_bytes(), re.DOTALL), message.read_bytes()
    log = programs.directory / "core.log"
    until(lambda: "session ended" in log.read_text(), "the end of the session")
    events = [each for each in log.read_text().splitlines() if "client_ip=" in each]
    assert [re.findall(r"message accepted|session ended|$", each)[0] for each in events] == ["message accepted", "session ended"]
    # HAProxy's log has the session too, by the same name.
    (name,) = re.findall(r"session ended id=(\S+)", events[-1])
    own = programs.directory / "haproxy.log"
    assert until(lambda: re.search(rf"^{name} 127\.0\.0\.1:.* TLSv1\.3 ", own.read_text(), re.MULTILINE), "its line")


@pytest.mark.parametrize("name", FILES)
def test_every_server_and_listener_for_clients_has_a_user_timeout(name: str) -> None:
    lines = re.findall(r"^ +(?:server|bind) .*", _settings(name), re.MULTILINE)
    expected = {"server": "${FUMI_NODE_TCP_USER_TIMEOUT-25s}", "bind": "${FUMI_TCP_USER_TIMEOUT-30s}"}
    without = [line for line in lines if f' tcp-ut "{expected[line.split()[0]]}"' not in line]
    assert [line.split()[1] for line in without] == ['"${FUMI_METRICS-127.0.0.1:8405}"']


def test_both_connections_of_a_session_detect_that_the_other_host_has_vanished(
    haproxy: StartHAProxy, fumi_core: StartFumiCore
) -> None:
    core, _ = fumi_core()
    port = free_port()
    smtp, submission, smtps = (f"127.0.0.1:{each}" for each in (port, free_port(), free_port()))
    process = haproxy(
        "layer4.cfg",
        port,
        LISTEN_SMTP=smtp,
        LISTEN_SUBMISSION=submission,
        LISTEN_SMTPS=smtps,
        PORT_SMTP=core,
        HEALTH_INTERVAL="1h",
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert client.recv(100).startswith(b"220 ")
        ends = (client.getsockname()[1], core)
        # The first health check has no options, and may not have ended yet.
        until(lambda: sum(sock.getpeername()[1] in ends for sock in connections(process.pid)) == 2, "the end of the check")
        for sock in connections(process.pid):
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            timeout = 25_000 if sock.getpeername()[1] == core else 30_000
            tcp = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
            assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in tcp] == [timeout, 10, 2]


def test_mutual_tls_requires_a_client_certificate_unless_it_is_optional(
    programs: Programs,
    haproxy: StartHAProxy,
    fumi_core: StartFumiCore,
    trusting: ssl.SSLContext,
    client_certificate: ClientCertificate,
) -> None:
    core, _ = fumi_core()
    required, optional = free_port(), free_port()
    modes: tuple[tuple[int, dict[str, Any]], ...] = ((required, {}), (optional, {"CLIENT_CERT": "optional"}))
    for port, mode in modes:
        variables = {"LISTEN": f"127.0.0.1:{port}", "BACKEND": f"127.0.0.1:{core}", "CLIENT_CA": client_certificate.ca, **mode}
        haproxy("mutual-tls.cfg", port, f"{port}.log", **variables)
    with pytest.raises((ssl.SSLError, OSError, smtplib.SMTPServerDisconnected)):
        send(required, trusting)
    send(optional, trusting)
    trusting.load_cert_chain(client_certificate.cert, client_certificate.key)
    send(required, trusting)
    send(optional, trusting)
    assert len(stored(programs, "core")) == 3


def test_with_two_nodes_mail_goes_on_when_one_is_killed(
    programs: Programs, haproxy: StartHAProxy, fumi_core: StartFumiCore, trusting: ssl.SSLContext
) -> None:
    nodes = [fumi_core(name=name) for name in ("one", "two")]
    port, metrics = free_port(), free_port()
    variables = {f"BACKEND_{number}": f"127.0.0.1:{core}" for number, (core, _) in enumerate(nodes, 1)}
    # Checked at the start, and not again before the test is over.
    usual = {"LISTEN": f"127.0.0.1:{port}", "METRICS": f"127.0.0.1:{metrics}", "BALANCE": "roundrobin", "HEALTH_INTERVAL": "1h"}
    haproxy("two-nodes.cfg", port, **usual, **variables)
    for _ in range(4):
        send(port, trusting)
    assert [len(stored(programs, name)) for name in ("one", "two")] == [2, 2]
    programs.stop(nodes[0][1], 9)
    for _ in range(4):
        send(port, trusting)
    assert [len(stored(programs, name)) for name in ("one", "two")] == [2, 6]
    assert metric(metrics, 'haproxy_backend_bytes_in_total{proxy="smtps"}') > 0
    with pytest.raises(urllib.request.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{metrics}/", timeout=30)


def test_a_check_finds_the_killed_node(programs: Programs, haproxy: StartHAProxy, fumi_core: StartFumiCore) -> None:
    nodes = [fumi_core(name=name) for name in ("one", "two")]
    port, metrics = free_port(), free_port()
    variables = {f"BACKEND_{number}": f"127.0.0.1:{core}" for number, (core, _) in enumerate(nodes, 1)}
    own = {"LISTEN": f"127.0.0.1:{port}", "METRICS": f"127.0.0.1:{metrics}", "HEALTH_INTERVAL": "50ms"}
    haproxy("two-nodes.cfg", port, **own, **variables)
    up = 'haproxy_backend_active_servers{proxy="smtps"}'
    # A check that was late, on a busy machine, is one that failed.
    until(lambda: metric(metrics, up) == 2, "both nodes")
    programs.stop(nodes[1][1], 9)
    until(lambda: metric(metrics, up) == 1, "one node less")
    fumi_core(name="two", port=nodes[1][0])
    until(lambda: metric(metrics, up) == 2, "its return")


def test_at_layer_4_fumi_edge_does_tls_and_starttls_and_checks_leave_no_trace(
    programs: Programs, haproxy: StartHAProxy, fumi_core: StartFumiCore, certificate: CertificateFiles, trusting: ssl.SSLContext
) -> None:
    core_metrics, metrics = free_port(), free_port()
    core, _ = fumi_core("--metrics", f"127.0.0.1:{core_metrics}")
    behind = {name: free_port() for name in ("SMTP", "SUBMISSION", "SMTPS")}
    nodes = [
        programs.start(
            BIN / "fumi-edge", "--cert", certificate[0], "--key", certificate[1], "--backend", f"127.0.0.1:{core}",
            "--listen", f"{host}:{behind['SMTPS']}", "--starttls-listen", f"{host}:{behind['SMTP']}",
            "--starttls-listen", f"{host}:{behind['SUBMISSION']}", "--accept-proxy", "--health-interval", "0", log=f"{host}.log",
        )
        for host in ("127.0.0.1", "127.0.0.2")
    ]  # fmt: skip
    for host in ("127.0.0.1", "127.0.0.2"):
        log = programs.directory / f"{host}.log"
        await_count(log, "listening", 3)
    ports = {name: free_port() for name in behind}
    variables: dict[str, Any] = {f"LISTEN_{name}": f"127.0.0.1:{port}" for name, port in ports.items()}
    variables |= {f"PORT_{name}": port for name, port in behind.items()}
    own = {"NODE_2": "127.0.0.2", "METRICS": f"127.0.0.1:{metrics}", "HEALTH_INTERVAL": "50ms", "BALANCE": "roundrobin"}
    haproxy("layer4.cfg", ports["SMTPS"], **variables, **own)
    checks = 'fumi_core_proxy_headers_total{result="ok",version="2"}'
    until(lambda: metric(core_metrics, checks) >= 12, "checks of three listeners of two nodes, twice")
    for name in ("smtp", "submission", "smtps"):
        up = f'haproxy_backend_active_servers{{proxy="{name}"}}'
        # A check that was late, on a busy machine, is one that failed.
        await_metric(metrics, up, 2)
    sent = 0
    for _ in range(2):
        for name, port in ports.items():
            send(port, trusting, starttls=name != "SMTPS")
            sent += 1
    log = programs.directory / "core.log"
    # A STARTTLS client is two for the core: before and after.
    until(lambda: log.read_text().count("session ended") == 10, "the end of the sessions")
    assert len(re.findall("messages=1", log.read_text())) == len(stored(programs, "core")) == sent
    edges = [programs.directory / f"{host}.log" for host in ("127.0.0.1", "127.0.0.2")]
    until(lambda: sum(edge.read_text().count("ended") for edge in edges) == sent, "the end of the connections")
    for path in (log, *edges):
        assert not re.search("WARN|ERROR", path.read_text()), path.read_text()
    assert log.read_text().count("ended") == 10
    programs.stop(nodes[0], 9)
    for name, port in ports.items():
        send(port, trusting, starttls=name != "SMTPS")
    assert len(stored(programs, "core")) == sent + 3


def test_a_variable_that_is_empty_adds_no_second_node(programs: Programs, haproxy: StartHAProxy) -> None:
    listeners = {f"LISTEN_{name}": f"127.0.0.1:{free_port()}" for name in ("SMTP", "SUBMISSION", "SMTPS")}
    metrics = free_port()
    haproxy("layer4.cfg", metrics, METRICS=f"127.0.0.1:{metrics}", NODE_2="", HEALTH_INTERVAL="1h", **listeners)
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=30) as response:
        assert set(re.findall(r'server="(\w+)"', response.read().decode())) == {"node1"}


def test_a_reload_gives_sessions_the_time_that_a_stop_gives_them(
    programs: Programs, haproxy: StartHAProxy, fumi_core: StartFumiCore, trusting: ssl.SSLContext
) -> None:
    core, _ = fumi_core()
    port = free_port()
    own = {"LISTEN": f"127.0.0.1:{port}", "BACKEND": f"127.0.0.1:{core}", "HEALTH_INTERVAL": "1h"}
    master = haproxy("implicit-tls.cfg", port, flags=["-W"], **own)
    log = programs.directory / "haproxy.log"
    with smtplib.SMTP_SSL("localhost", port, context=trusting) as open_before:
        master.send_signal(signal.SIGUSR2)
        until(lambda: log.read_text().count("Loading success") == 2, "the reload")
        send(port, trusting)
        open_before.sendmail("a@b.example", ["c@d.example"], TEXT)
    assert len(stored(programs, "core")) == 2
    # As long as an SMTP client may be silent.
    (drain,) = set(re.findall(r"\$\{FUMI_DRAIN_TIMEOUT-(\w+)\}", _settings("implicit-tls.cfg")))
    assert f"${{FUMI_IDLE_TIMEOUT-{drain}}}" in _settings("implicit-tls.cfg")
    assert programs.stop(master) in (0, 143, -signal.SIGTERM)


@pytest.mark.parametrize("limit", ["MAX_CLIENTS_PER_IP", "RATE_PER_IP"])
def test_an_address_has_so_many_connections_and_no_more(
    limit: str, programs: Programs, haproxy: StartHAProxy, fumi_core: StartFumiCore, trusting: ssl.SSLContext
) -> None:
    core, _ = fumi_core()
    port = free_port()
    limited: dict[str, Any] = {limit: 2}
    haproxy("implicit-tls.cfg", port, LISTEN=f"127.0.0.1:{port}", BACKEND=f"127.0.0.1:{core}", **limited)
    with (
        smtplib.SMTP_SSL("localhost", port, context=trusting),
        smtplib.SMTP_SSL("localhost", port, context=trusting),
    ):
        with pytest.raises((OSError, smtplib.SMTPServerDisconnected)):
            smtplib.SMTP_SSL("localhost", port, context=trusting)
        smtplib.SMTP_SSL("localhost", port, context=trusting, source_address=("127.0.0.9", 0)).quit()


@pytest.mark.parametrize(
    "offer", [["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], ["-tls1_2", "-cipher", "AES128-SHA:AES128-GCM-SHA256"]]
)
def test_old_tls_is_refused(offer: list[str], programs: Programs, haproxy: StartHAProxy) -> None:
    port = free_port()
    haproxy("implicit-tls.cfg", port, LISTEN=f"127.0.0.1:{port}")
    said = programs.run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", *offer, status=1)
    assert "alert" in said


def test_it_may_run_as_another_user(programs: Programs, haproxy: StartHAProxy) -> None:
    user = re.findall(r"FUMI_USER=(\w+)", README)[0] if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    entry = pwd.getpwnam(user)
    port = free_port()
    own = {"USER": user, "GROUP": grp.getgrgid(entry.pw_gid).gr_name}
    process = haproxy("implicit-tls.cfg", port, LISTEN=f"127.0.0.1:{port}", **own)
    status = Path(f"/proc/{process.pid}/status")

    def ids() -> list[str]:
        return re.findall(r"^[UG]id:\t(\d+)", status.read_text(), re.MULTILINE)

    # The ports come first.
    until(lambda: ids() == [str(entry.pw_uid), str(entry.pw_gid)], "its becoming somebody else")


# The README's commands

CAT, *SERVE, DRAIN = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SOCAT = """#!{python}
import socket, sys

assert sys.argv[1] == "stdio"
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[2])
    sock.sendall(sys.stdin.buffer.read())
    sock.shutdown(socket.SHUT_WR)
    while data := sock.recv(4096):
        sys.stdout.buffer.write(data)
"""


def takes_commands(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_the_commands_that_take_a_node_out_and_back_do_so(
    programs: Programs, haproxy: StartHAProxy, fumi_core: StartFumiCore, trusting: ssl.SSLContext
) -> None:
    nodes = [fumi_core(name=name) for name in ("one", "two")]
    port, path = free_port(), programs.directory / "commands.sock"
    variables: dict[str, Any] = {f"BACKEND_{number}": f"127.0.0.1:{core}" for number, (core, _) in enumerate(nodes, 1)}
    variables |= {"LISTEN": f"127.0.0.1:{port}", "BALANCE": "roundrobin", "HEALTH_INTERVAL": "1h", "STATS": path}
    haproxy("two-nodes.cfg", port, **variables)
    # The ports come first.
    until(lambda: takes_commands(path), "the socket for commands")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (programs.directory / "socat").write_text(SOCAT.format(python=sys.executable))
    (programs.directory / "socat").chmod(0o755)
    tools = f"{programs.directory}:{os.environ['PATH']}"
    for command, expected in zip(DRAIN.splitlines(), ([0, 4], [2, 6]), strict=True):
        here = command.replace("/run/fumi-haproxy.sock", str(path))
        assert programs.run("sh", "-euc", here, environment={"PATH": tools}).strip() == ""
        for _ in range(4):
            send(port, trusting)
        assert [len(stored(programs, name)) for name in ("one", "two")] == expected


@pytest.mark.parametrize("block", SERVE, ids=lambda block: re.findall(r"([\w-]+)\.cfg", block)[0])
def test_the_commands_of_the_readme_do_what_it_says(
    block: str, programs: Programs, certificate: CertificateFiles, client_certificate: ClientCertificate, trusting: ssl.SSLContext
) -> None:
    for path in certificate:
        (programs.directory / path.name).write_bytes(path.read_bytes())
    (programs.directory / "client-ca.pem").write_bytes(client_certificate.ca.read_bytes())
    (programs.directory / "haproxy").symlink_to(DIRECTORY)
    programs.run("sh", "-euc", CAT)
    assert stat.S_IMODE((programs.directory / "fumi.pem").stat().st_mode) == 0o600
    free = {port: free_port() for port in re.findall(r":(\d+)", block)}
    front = {name: free_port() for name in ("LISTEN", "LISTEN_SMTP", "LISTEN_SUBMISSION", "LISTEN_SMTPS", "METRICS")}
    others = {f"FUMI_{name}": f"127.0.0.1:{port}" for name, port in front.items()}
    for variable, port in (("BACKEND", "2525"), ("BACKEND_1", "2525"), ("BACKEND_2", "2526")):
        others[f"FUMI_{variable}"] = f"127.0.0.1:{free.get(port)}"
    for variable, port in (("PORT_SMTP", "10025"), ("PORT_SUBMISSION", "10587"), ("PORT_SMTPS", "10465")):
        others[f"FUMI_{variable}"] = str(free.get(port))
    tls = front["LISTEN_SMTPS" if "layer4" in block else "LISTEN"]
    environment = ["env", f"PATH={BIN}:{os.environ['PATH']}", *(f"{name}={value}" for name, value in others.items())]
    for command in re.split(r"(?<!\\)\n", re.sub(r"(?<=:)\d+", lambda found: str(free[found[0]]), block.strip())):
        ports = re.findall(r"--listen 127\.0\.0\.1:(\d+)", command)
        programs.start(*environment, "sh", "-c", re.sub(r"^((?:\w+=\S+ )*)", r"\1exec ", command), port=int((ports or [tls])[0]))
    trusting.load_cert_chain(client_certificate.cert, client_certificate.key)
    send(tls, trusting)
    assert len(stored(programs, "inbox")) == 1
    if "layer4" in block:
        for name in ("LISTEN_SMTP", "LISTEN_SUBMISSION"):
            send(front[name], trusting, starttls=True)
        assert len(stored(programs, "inbox")) == 3
