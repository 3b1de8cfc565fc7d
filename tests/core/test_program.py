"""fumi-core as an operator meets it: flags, files, environment, signals, metrics."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import fumi_core
from fumi_core.program.users import hash_password
from tests.starter import finished

PROGRAM = str(Path(sys.executable).with_name("fumi-core"))


def get(url: str) -> tuple[int, str]:
    with contextlib.closing(urllib.request.urlopen(url, timeout=60)) as answer:
        return answer.status, answer.read().decode()


def test_the_built_in_app_requires_the_header_and_delivers_into_a_maildir(
    start: Any, connect: Any, tmp_path: Path, free_port: Any
) -> None:
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


def test_settings_come_from_flags_then_environment_then_file(start: Any, connect: Any, tmp_path: Path, free_port: Any) -> None:
    port = free_port()
    config = tmp_path / "fumi.toml"
    config.write_text(
        f'name = "file"\nlog-format = "json"\n[core]\nlisten = ["127.0.0.1:{port}"]\nproxy_protocol = "off"\n'
        'banner = "file"\ndeliver = "discard:"\n[edge]\nnothing = 1\n'
    )
    program = start("--config", str(config), "--name", "flag", environment={"FUMI_CORE_BANNER": "environment"})
    assert connect(port).banner == b"220 flag ESMTP environment\r\n"
    program.stop()
    lines = [json.loads(line) for line in program.log.read_text().splitlines()]
    assert lines[0]["event"] == "listening"


def test_an_app_keeps_its_options_unless_a_flag_is_given(start: Any, connect: Any, tmp_path: Path, free_port: Any) -> None:
    (tmp_path / "mine.py").write_text("from fumi_core import Fumi\napp = Fumi(auth_optional=True, name='own', banner='own')\n")
    port = free_port()
    start("--listen", f"127.0.0.1:{port}", "--banner", "flag", "mine:app")
    assert connect(port).banner == b"220 own ESMTP flag\r\n"


def test_metrics_count_what_happened(start: Any, connect: Any, eventually: Any, tmp_path: Path, free_port: Any) -> None:
    port, metrics = free_port(), free_port()
    (tmp_path / "users").write_text("")
    flags = ("--proxy-protocol", "off", "--deliver", "discard:", "--metrics", f"127.0.0.1:{metrics}")
    flags = (*flags, "--users", "users", "--allow-insecure-auth")
    start("--listen", f"127.0.0.1:{port}", *flags)
    base = f"http://127.0.0.1:{metrics}"
    eventually(lambda: reachable(metrics))
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


def reachable(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return finished("fumi-core", *arguments, cwd=cwd)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--listen", "nonsense"],
        ["--listen", "::1:25"],
        ["--listen", "fd:77"],
        ["--listen", "192.0.2.1:2525"],
        ["--deliver", "pigeon:"],
        ["--deliver", "maildir:/proc/nothing"],
        ["--trusted-proxy", "nonsense"],
        ["--config", "missing.toml"],
        ["--size", "-1"],
        ["--banner", "grüß Gott"],
        ["--name", "two words"],
        ["--drain-timeout", "0"],
        ["--nonsense"],
        ["--listen", "a..b:25"],
        ["--listen", "x" * 70 + ":25"],
        [".x:app"],
        ["nomodule:app"],
        ["noapp"],
        ["json:dumps"],
        ["json:nothing"],
        ["--deliver", "discard:", "json:dumps"],
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_2(arguments: list[str], tmp_path: Path) -> None:
    done = run("--proxy-protocol", "off", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("reference", "wanted"), [("./m5.py:app", "write m5:app"), ("sub/m5.py:app", "write sub.m5:app"), ("m5.py:a", "write m5:a")]
)
def test_who_names_an_app_by_its_file_hears_how_to_name_it(reference: str, wanted: str, tmp_path: Path) -> None:
    done = run(reference, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert wanted in done.stderr


def test_users_that_are_no_text_are_blamed_on_their_file(tmp_path: Path) -> None:
    (tmp_path / "users").write_bytes(b"joe:\xff\n")
    done = run("--users", "users", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "Error: --users users: is not UTF-8 text\n")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--trusted-proxy", "192.0.2.1"), "--trusted-proxy says who may send a PROXY header"),
        (("--require-tls",), "--require-tls without PROXY headers needs --assume-tls"),
    ],
)
def test_flags_that_need_a_proxy_header_are_refused_without_one(flags: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    always = ("--check", "--listen", "127.0.0.1:0", "--deliver", "discard:", *flags)
    done = run("--proxy-protocol", "off", *always, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert problem in done.stderr
    assert run(*always, cwd=tmp_path).returncode == 0
    if "--require-tls" in flags:
        assert run("--proxy-protocol", "off", "--assume-tls", *always, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("flags", "warnings"),
    [
        (("--deliver", "smtp:127.0.0.1:9"), 1),
        (("--deliver", "smtp:127.0.0.1:9", "--users", "users"), 1),
        (("--deliver", "smtp:127.0.0.1:9", "--workers", "2"), 1),
        (("--deliver", "smtp:127.0.0.1:9", "--users", "users", "--auth-required"), 0),
        (("--deliver", "smtp:127.0.0.1:9", "--domain", "example.org"), 0),
        (("--deliver", "lmtp:127.0.0.1:9"), 0),
        (("--deliver", "discard:"), 0),
    ],
)
def test_an_open_relay_says_once_that_it_is_one(
    flags: tuple[str, ...], warnings: int, start: Any, connect: Any, tmp_path: Path, free_port: Any
) -> None:
    (tmp_path / "users").write_text(f"joe:{hash_password('secret')}\n")
    program = start("--listen", f"127.0.0.1:{(port := free_port())}", "--proxy-protocol", "off", "--name", "mx.example", *flags)
    with contextlib.closing(connect(port)) as client:
        assert client.banner.startswith(b"220")
    program.stop()
    lines = [line for line in program.log.read_text().splitlines() if " WARNING " in line and "open relay" in line]
    assert len(lines) == warnings
    for line in lines:
        assert "an open relay" in line
        assert "add --domain, or --users with --auth-required" in line


@pytest.mark.parametrize(
    ("host", "flags", "warned"),
    [("127.0.0.1", ["--assume-tls"], False), ("", ["--assume-tls"], True), ("0.0.0.0", ["--assume-tls"], True), ("", [], False)],
)
def test_assume_tls_for_other_hosts_is_warned_of(
    host: str, flags: list[str], warned: bool, start: Any, connect: Any, free_port: Any
) -> None:
    program = start("--listen", f"{host}:{(port := free_port())}", "--deliver", "discard:", "--proxy-protocol", "off", *flags)
    assert connect(port).banner.startswith(b"220")
    assert ("plaintext from other hosts counts as TLS" in program.log.read_text()) is warned


def test_a_taken_port_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        done = run("--listen", f"127.0.0.1:{sock.getsockname()[1]}", cwd=tmp_path)
    assert done.returncode == 2
    assert "in use (another process has it; stop that one or choose another address)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_port_that_is_taken_on_ipv6_alone_is_taken(tmp_path: Path, free_port: Any) -> None:
    with socket.create_server(("::1", free_port()), family=socket.AF_INET6) as sock:
        done = run("--listen", f":{sock.getsockname()[1]}", "--deliver", "discard:", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "another process has it" in done.stderr


@pytest.mark.parametrize(
    ("text", "problem"), [("lisen = 1", "lisen"), ("[cores]\na=1", "cores"), ("=", "Invalid"), ("[core]\nsize='x'", "size")]
)
def test_a_wrong_config_file_is_one_line_and_exit_2(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "f.toml").write_text(text)
    done = run("--config", "f.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_check_says_so_and_ends(tmp_path: Path) -> None:
    done = run("--check", "--listen", "127.0.0.1:0", "--deliver", "discard:", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "configuration OK\n")


@pytest.mark.parametrize(("name", "warned"), [("localhost", True), ("localhost.localdomain.", True), ("mx.example.org", False)])
def test_a_server_that_calls_itself_localhost_is_told_of_name(
    start: Any, free_port: Any, eventually: Any, name: str, warned: bool
) -> None:
    program = start("--listen", f"127.0.0.1:{free_port()}", "--proxy-protocol", "off", "--deliver", "discard:", "--name", name)
    text = program.log.read_text()
    assert (f"WARNING fumi.core the banner says 220 localhost: set --name name={name}" in text) is warned


def test_check_names_an_address_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "sock"))
        unix.listen()
        addresses = [f"127.0.0.1:{tcp.getsockname()[1]}", f"unix:{tmp_path}/sock"]
        flags = [each for address in addresses for each in ("--listen", address)]
        done = run("--check", *flags, "--deliver", "discard:", cwd=tmp_path)
    said = [f"{address} is already in use (by a running fumi-core or another program)" for address in addresses]
    assert (done.returncode, done.stdout.splitlines()) == (0, [*said, "configuration OK"])


def test_check_fails_for_an_app_that_can_never_take_mail(tmp_path: Path) -> None:
    source = "from fumi_core import Fumi\napp = Fumi()\nopen_to_all = Fumi(auth_optional=True)\n"
    source += "plaintext = Fumi()\nplaintext.on_auth(lambda ctx, next: ctx.accept())\n"
    (tmp_path / "never.py").write_text(source)
    check = ("--check", "--listen", "127.0.0.1:0")
    for name, problem in (("app", "there is no on_auth handler"), ("plaintext", "needs TLS, which no client can have")):
        done = run(*check, f"never:{name}", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"Error: never:{name}: nobody could send mail: authentication is required")
        assert problem in done.stderr
    assert run(*check, "never:open_to_all", cwd=tmp_path).returncode == 0
    assert run(*check, "--assume-tls", "never:plaintext", cwd=tmp_path).returncode == 0


def test_check_makes_no_maildir_and_says_who_would(tmp_path: Path) -> None:
    flags = ("--check", "--listen", "127.0.0.1:0", "--deliver", "maildir:mail/box")
    done = run(*flags, cwd=tmp_path)
    user = pwd.getpwuid(os.getuid()).pw_name
    assert done.stdout == f"maildir:mail/box is not there yet: user {user} will make it\nconfiguration OK\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mail").touch()
    done = run(*flags, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--deliver maildir:mail/box: is not there, and user {user} cannot make it in {tmp_path / 'mail'}" in done.stderr


def test_check_is_content_with_a_maildir_that_is_there(tmp_path: Path) -> None:
    for name in ("tmp", "new", "cur"):
        (tmp_path / "maildir" / name).mkdir(parents=True)
    done = run("--check", "--listen", "127.0.0.1:0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "configuration OK\n")


def test_ports_that_the_kernel_chose_are_in_the_log(start: Any, connect: Any, eventually: Any) -> None:
    flags = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--proxy-protocol", "off", "--deliver", "discard:")
    program = start(*flags, wait="metrics")
    listening, metrics = re.findall(r"(listening|metrics) address=127\.0\.0\.1:(\d+)", program.log.read_text())
    assert connect(int(listening[1])).banner.startswith(b"220")
    eventually(lambda: reachable(int(metrics[1])))


@pytest.mark.parametrize(("mode", "given"), [(0o660, "flag"), (0o606, "file")])
def test_a_unix_socket_gets_the_mode_that_was_asked_for(start: Any, tmp_path: Path, mode: int, given: str) -> None:
    (tmp_path / "f.toml").write_text(f'socket-mode = "{mode:o}"\n')
    flags = ("--socket-mode", f"0{mode:o}") if given == "flag" else ("--config", "f.toml")
    start("--listen", f"unix:{tmp_path}/sock", "--proxy-protocol", "off", "--deliver", "discard:", *flags, wait="starting")
    assert stat.S_IMODE((tmp_path / "sock").stat().st_mode) == mode
    done = run("--listen", "127.0.0.1:0", "--socket-mode", "0660", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "Error: --socket-mode is for Unix listeners: listen on unix:/path, or leave it out\n",
    )


def test_it_listens_on_an_inherited_descriptor(tmp_path: Path, connect: Any) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        os.set_inheritable(sock.fileno(), True)
        flags = ["--listen", f"fd:{sock.fileno()}", "--proxy-protocol", "off", "--deliver", "discard:"]
        process = subprocess.Popen([PROGRAM, *flags], pass_fds=[sock.fileno()], stderr=subprocess.DEVNULL)
        try:
            assert connect(sock.getsockname()[1]).banner.startswith(b"220")
        finally:
            process.terminate()
            assert process.wait(40) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"], ids=["stderr", "all"])
def test_no_socket_takes_the_place_of_a_stream_that_is_closed_from_the_start(
    connect: Any, eventually: Any, free_port: Any, tmp_path: Path, workers: str, closed: str
) -> None:
    port, metrics = free_port(), free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{metrics}", "--workers", workers, "--deliver", "discard:"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {closed}', "bash", PROGRAM, *flags, "--proxy-protocol", "off"], cwd=tmp_path
    )
    try:
        eventually(lambda: process.poll() is not None or (reachable(port) and reachable(metrics)))
        assert process.poll() is None
        client = connect(port)
        assert client.banner.startswith(b"220")
        client.close()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [str(process.pid), *children]:
            for fd in (0, 1, 2) if "0" in closed else (2,):
                assert os.readlink(f"/proc/{pid}/fd/{fd}") == os.devnull
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_mail_does_not_wait_for_who_reads_the_log(
    connect: Any, eventually: Any, free_port: Any, tmp_path: Path, workers: str
) -> None:
    port, metrics = free_port(), free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{metrics}", "--workers", workers, "--deliver", "discard:"]
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with open(ours, "rb") as log, open(theirs, "wb", buffering=0) as full:
        while full.write(b"x" * 4096):
            pass
        os.set_blocking(theirs, True)
        process = subprocess.Popen([PROGRAM, *flags, "--proxy-protocol", "off"], stderr=theirs, cwd=tmp_path)
        full.close()
        try:
            eventually(lambda: reachable(port) and reachable(metrics))
            for _ in range(5):
                client = connect(port)
                client.envelope()
                client.say("DATA")
                assert client.say("hi\r\n.").startswith(b"250")
                client.say("QUIT")
                client.close()
            assert get(f"http://127.0.0.1:{metrics}/readyz") == (200, "ready\n")
            process.terminate()
            # What waited has its moment, in which somebody reads again.
            text = log.read().decode().lstrip("x")
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    assert text.count("messages=1 ") == 5
    assert text.count("stopping signal=SIGTERM") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_does_not_wait_for_who_reads_the_log(
    connect: Any, eventually: Any, free_port: Any, tmp_path: Path, workers: str
) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    theirs.send(b"x")
            theirs.setblocking(True)
            flags = ("--listen", f"127.0.0.1:{port}", "--workers", workers, "--deliver", "discard:", "--proxy-protocol", "off")
            process = subprocess.Popen([PROGRAM, *flags], stderr=theirs, cwd=tmp_path)
        stack.callback(process.wait)
        stack.callback(process.kill)
        eventually(lambda: reachable(port))
        client = connect(port)
        assert client.banner.startswith(b"220")
        client.close()
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize("program", ["core", "edge"])
def test_a_package_that_is_run_is_its_program(program: str) -> None:
    run = finished(sys.executable, "-m", f"fumi_{program}", "--help")
    assert (run.returncode, run.stdout) == (0, finished(Path(sys.executable).with_name(f"fumi-{program}"), "--help").stdout)


def test_the_package_the_program_and_the_distribution_have_one_version() -> None:
    assert fumi_core.__version__ == version("fumi-smtp")
    assert finished(PROGRAM, "--version").stdout == f"fumi-core, version {fumi_core.__version__}\n"


def test_lenient_flags_take_what_devices_send(start: Any, connect: Any, free_port: Any) -> None:
    port = free_port()
    flags = ("--proxy-protocol", "off", "--deliver", "discard:", "--bare-newlines", "normalize", "--lenient-addresses")
    start("--listen", f"127.0.0.1:{port}", *flags)
    client = connect(port)
    for line in ("EHLO x", "MAIL FROM:root", "RCPT TO:<a.@b.example.>"):
        assert client.say(line).startswith(b"250")
    client.say("DATA")
    assert client.say("hi\nthere\r\n.").startswith(b"250")


def test_debug_shows_the_dialogue_and_nothing_of_asyncio(start: Any, connect: Any, eventually: Any, free_port: Any) -> None:
    port = free_port()
    program = start("--proxy-protocol", "off", "--deliver", "discard:", "--listen", f"127.0.0.1:{port}", "--log-level", "debug")
    connect(port).say("EHLO client.example")
    eventually(lambda: 'received="EHLO client.example"' in program.log.read_text())
    assert "asyncio" not in program.log.read_text()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("app = Fumi(szie=1)", "did you mean 'size'?"),
        ("plugins.max_size(0)", "max_size: n is"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
        ("app = (", "SyntaxError"),
        ("Fumi().on_data(len)", "on_data: len() is called with (ctx, next)"),
    ],
)
def test_an_app_that_cannot_be_loaded_is_an_error_at_its_own_line(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "broken.py").write_text(f"from fumi_core import Fumi, plugins\n\n{line}\n")
    done = run("--check", "broken:app", cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
    assert f"{tmp_path / 'broken.py'}:3)" in done.stderr
    assert "Traceback" not in done.stderr
