"""fumi-core as an operator meets it: flags, files, environment, signals, metrics."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest

import fumi_core
from tests.core.client import Connect
from tests.core.programs import PROGRAM, Start, get, run
from tests.support.ports import free_port
from tests.support.programs import listening
from tests.support.starter import finished
from tests.support.waiting import until


def test_the_built_in_app_requires_the_header_and_delivers_into_a_maildir(start: Start, connect: Connect, tmp_path: Path) -> None:
    port = free_port()
    program = start("--listen", f"127.0.0.1:{port}", "--name", "mx.example", "--banner", "hello")
    client = connect(port, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
    assert client.banner == b"220 mx.example ESMTP hello\r\n"
    client.envelope()
    client.say("DATA")
    assert client.say("hi\r\n.").startswith(b"250")
    (path,) = (tmp_path / "maildir" / "new").iterdir()
    assert b"([192.0.2.1])" in path.read_bytes()
    client.close()
    assert program.stop() == 0
    assert "session ended" in program.log.read_text()


def test_settings_come_from_flags_then_environment_then_file(start: Start, connect: Connect, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "fumi.toml"
    config.write_text(
        f'name = "file"\nlog-format = "json"\n[core]\nlisten = ["127.0.0.1:{port}"]\nproxy_protocol = "off"\n'
        'banner = "file"\ndeliver = "discard:"\n[edge]\nnothing = 1\n'
    )
    program = start("--config", str(config), "--name", "flag", environment={"FUMI_CORE_BANNER": "environment"})
    client = connect(port)
    assert client.banner == b"220 flag ESMTP environment\r\n"
    client.close()
    program.stop()
    lines = [json.loads(line) for line in program.log.read_text().splitlines()]
    assert lines[0]["event"] == "listening"


def test_an_app_keeps_its_options_unless_a_flag_is_given(start: Start, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from fumi_core import Fumi\napp = Fumi(auth_optional=True, name='own', banner='own')\n")
    port = free_port()
    start("--listen", f"127.0.0.1:{port}", "--banner", "flag", "mine:app")
    assert connect(port).banner == b"220 own ESMTP flag\r\n"


def test_metrics_count_what_happened(start: Start, connect: Connect, tmp_path: Path) -> None:
    port, metrics = free_port(), free_port()
    (tmp_path / "users").write_text("")
    flags = ["--proxy-protocol", "off", "--deliver", "discard:", "--metrics", f"127.0.0.1:{metrics}"]
    flags += ["--users", "users", "--allow-insecure-auth"]
    start("--listen", f"127.0.0.1:{port}", *flags)
    base = f"http://127.0.0.1:{metrics}"
    until(lambda: listening(metrics))
    assert get(f"{base}/healthz") == (200, "ok\n")
    assert get(f"{base}/readyz") == (200, "ready\n")
    client = connect(port)
    client.envelope()
    client.say("DATA")
    client.say("hi\r\n.")
    client.say("QUIT")
    client = connect(port)
    client.say("EHLO x")
    client.say("AUTH PLAIN AGpvZQB3cm9uZw==")
    connect(port).say("GET / HTTP/1.0")
    text = get(f"{base}/metrics")[1]
    values = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    for name, value in {
        "fumi_core_connections_total": 3,
        'fumi_core_sessions_total{secure="false",tls_version="none"}': 3,
        'fumi_core_commands_total{command="DATA"}': 1,
        'fumi_core_commands_total{command="VRFY"}': 0,
        'fumi_core_replies_total{code="250"}': 5,
        'fumi_core_messages_total{result="accepted"}': 1,
        'fumi_core_messages_total{result="aborted"}': 0,
        'fumi_core_auth_total{method="PLAIN",result="failed"}': 1,
        'fumi_core_auth_total{method="CRAM-MD5",result="ok"}': 0,
        'fumi_core_rejected_total{reason="not_smtp"}': 1,
        'fumi_core_deliveries_total{result="ok",target="discard"}': 1,
        "fumi_core_message_bytes_sum": 4,
        "fumi_core_data_seconds_count": 1,
        'fumi_core_rejected_total{reason="max_clients"}': 0,
        'fumi_core_proxy_headers_total{result="malformed",version="none"}': 0,
    }.items():
        assert float(values[name]) == value, name
    with pytest.raises(urllib.error.HTTPError):
        get(f"{base}/nothing")


def test_ports_that_the_kernel_chose_are_in_the_log(start: Start, connect: Connect) -> None:
    flags = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--proxy-protocol", "off", "--deliver", "discard:")
    program = start(*flags, wait="serving metrics")
    clients, metrics = re.findall(r"(listening listener|serving metrics address)=127\.0\.0\.1:(\d+)", program.log.read_text())
    assert connect(int(clients[1])).banner.startswith(b"220")
    until(lambda: listening(int(metrics[1])))


@pytest.mark.parametrize(("mode", "given"), [(0o660, "flag"), (0o606, "file")])
def test_a_unix_socket_gets_the_requested_mode(start: Start, tmp_path: Path, mode: int, given: str) -> None:
    (tmp_path / "f.toml").write_text(f'socket-mode = "{mode:o}"\n')
    flags = ("--socket-mode", f"0{mode:o}") if given == "flag" else ("--config", "f.toml")
    start("--listen", f"unix:{tmp_path}/sock", "--proxy-protocol", "off", "--deliver", "discard:", *flags, wait="starting")
    assert stat.S_IMODE((tmp_path / "sock").stat().st_mode) == mode
    done = run("--listen", "127.0.0.1:0", "--socket-mode", "0660", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "Error: --socket-mode is for Unix listeners: listen on unix:/path, or remove it\n",
    )


def test_it_listens_on_an_inherited_descriptor(tmp_path: Path, connect: Connect) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        os.set_inheritable(sock.fileno(), True)
        flags = ["--listen", f"fd:{sock.fileno()}", "--proxy-protocol", "off", "--deliver", "discard:"]
        process = subprocess.Popen([PROGRAM, *flags], pass_fds=[sock.fileno()], stderr=subprocess.DEVNULL)
        try:
            client = connect(sock.getsockname()[1])
            assert client.banner.startswith(b"220")
            client.close()
        finally:
            process.terminate()
            assert process.wait(40) == 0


@pytest.mark.parametrize("program", ["core", "edge"])
def test_a_package_that_is_run_is_its_program(program: str) -> None:
    run = finished(sys.executable, "-m", f"fumi_{program}", "--help")
    assert (run.returncode, run.stdout) == (0, finished(Path(sys.executable).with_name(f"fumi-{program}"), "--help").stdout)


def test_the_package_the_program_and_the_distribution_have_one_version() -> None:
    assert fumi_core.__version__ == version("fumi-smtp")
    assert finished(PROGRAM, "--version").stdout == f"fumi-core, version {fumi_core.__version__}\n"


def test_lenient_flags_take_what_devices_send(start: Start, connect: Connect) -> None:
    port = free_port()
    flags = ("--proxy-protocol", "off", "--deliver", "discard:", "--bare-newlines", "normalize", "--lenient-addresses")
    start("--listen", f"127.0.0.1:{port}", *flags)
    client = connect(port)
    for line in ("EHLO x", "MAIL FROM:root", "RCPT TO:<a.@b.example.>"):
        assert client.say(line).startswith(b"250")
    client.say("DATA")
    assert client.say("hi\nthere\r\n.").startswith(b"250")


def test_debug_shows_the_dialogue_and_nothing_of_asyncio(start: Start, connect: Connect) -> None:
    port = free_port()
    program = start("--proxy-protocol", "off", "--deliver", "discard:", "--listen", f"127.0.0.1:{port}", "--log-level", "debug")
    connect(port).say("EHLO client.example")
    until(lambda: 'received="EHLO client.example"' in program.log.read_text())
    assert "asyncio" not in program.log.read_text()
