"""fumi-core refuses wrong settings and warns of dangerous ones."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from fumi_core.program.users import hash_password
from tests.core.client import Connect
from tests.core.programs import Start, run
from tests.support.ports import free_port


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
def test_the_error_for_the_file_of_an_app_says_how_to_name_it(reference: str, wanted: str, tmp_path: Path) -> None:
    done = run(reference, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert wanted in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "form"), [("--name", "two words", "a host name"), ("--banner", "grüß Gott", "printable")]
)
def test_the_error_for_a_value_that_its_option_rejects_names_the_flag(flag: str, value: str, form: str, tmp_path: Path) -> None:
    done = run(flag, value, "--deliver", "discard:", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"Error: {flag} is {form}")


def test_the_error_for_a_missing_module_names_no_place_in_python_itself(tmp_path: Path) -> None:
    done = run("missing_app:app", cwd=tmp_path)
    problem = "missing_app:app: ModuleNotFoundError: No module named 'missing_app'"
    assert (done.returncode, done.stderr) == (2, f"Error: {problem}\n")


def test_the_error_for_users_that_are_not_text_names_their_file(tmp_path: Path) -> None:
    (tmp_path / "users").write_bytes(b"joe:\xff\n")
    done = run("--users", "users", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "Error: --users users: the file is not UTF-8 text\n")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--trusted-proxy", "192.0.2.1"), "--trusted-proxy has no effect with --proxy-protocol off"),
        (("--require-tls",), "--require-tls needs PROXY headers or --assume-tls"),
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


def test_an_empty_target_is_an_error_and_not_the_default(tmp_path: Path) -> None:
    done = run("--check", "--listen", "127.0.0.1:0", "--deliver", "", cwd=tmp_path)
    assert done.returncode == 2
    assert "--deliver: '' is not a target" in done.stderr


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
    flags: tuple[str, ...], warnings: int, start: Start, connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "users").write_text(f"joe:{hash_password('secret')}\n")
    program = start("--listen", f"127.0.0.1:{(port := free_port())}", "--proxy-protocol", "off", "--name", "mx.example", *flags)
    with contextlib.closing(connect(port)) as client:
        assert client.banner.startswith(b"220")
    program.stop()
    lines = [line for line in program.log.read_text().splitlines() if " WARNING " in line and "open relay" in line]
    assert len(lines) == warnings
    for line in lines:
        assert "open relay: relays mail from anyone to anyone" in line
        assert "add --domain, or --users with --auth-required" in line


@pytest.mark.parametrize(
    ("host", "flags", "warned"),
    [("127.0.0.1", ["--assume-tls"], False), ("", ["--assume-tls"], True), ("0.0.0.0", ["--assume-tls"], True), ("", [], False)],
)
def test_assume_tls_for_other_hosts_is_warned_of(
    host: str, flags: list[str], warned: bool, start: Start, connect: Connect
) -> None:
    program = start("--listen", f"{host}:{(port := free_port())}", "--deliver", "discard:", "--proxy-protocol", "off", *flags)
    assert connect(port).banner.startswith(b"220")
    assert ("other hosts can connect in plaintext" in program.log.read_text()) is warned


def test_a_taken_port_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        done = run("--listen", f"127.0.0.1:{sock.getsockname()[1]}", cwd=tmp_path)
    assert done.returncode == 2
    assert "in use (another process has it; stop that one or choose another address)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_port_that_is_taken_on_ipv6_alone_is_taken(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("name", "warned"), [("localhost", True), ("localhost.localdomain.", True), ("mx.example.org", False)])
def test_a_banner_with_localhost_is_a_warning_that_names_the_flag(start: Start, name: str, warned: bool) -> None:
    flags = ("--listen", f"127.0.0.1:{free_port()}", "--proxy-protocol", "off", "--deliver", "discard:", "--name", name)
    program = start(*flags, wait="starting")  # which is logged after the warnings
    text = program.log.read_text()
    assert (f"WARNING fumi.core set --name: the banner is 220 localhost name={name}" in text) is warned


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("app = Fumi(szie=1)", "did you mean 'size'?"),
        ("plugins.max_size(0)", "max_size: n is"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
        ("app = (", "SyntaxError"),
        ("Fumi().on_data(len)", "on_data: handlers are called with (ctx, next), but len()"),
    ],
)
def test_an_app_that_cannot_be_loaded_is_an_error_at_its_own_line(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "broken.py").write_text(f"from fumi_core import Fumi, plugins\n\n{line}\n")
    done = run("--check", "broken:app", cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
    assert f"{tmp_path / 'broken.py'}:3)" in done.stderr
    assert "Traceback" not in done.stderr


FACTORIES = """
from fumi_core import Fumi

app = Fumi()

def make():
    return app

def forgetful():
    app

def broken():
    raise LookupError("no settings")

def demanding(settings):
    return app

async def later():
    return app
"""


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("factories:make", "factories:make is a function, not a Fumi; if it returns one, write factories:make()"),
        ("factories:nothing()", "factories:nothing(): factories has no nothing"),
        ("factories:forgetful()", "factories:forgetful() returned a NoneType, not a Fumi"),
        ("factories:broken()", "factories:broken(): LookupError: no settings ({}/factories.py:13)"),
        (
            "factories:demanding()",
            "factories:demanding(): TypeError: demanding() missing 1 required positional argument: 'settings'",
        ),
        ("factories:demanding(1)", "a function is called without arguments: write factories:demanding()"),
        ("factories:later()", "factories:later(): later is asynchronous; the app is made before there is an event loop"),
        ("factories:app()", "factories:app(): app is not a function"),
        ("factories.py:make()", "names a file and not a module: write factories:make()"),
        ("factories:()", "is not MODULE:APP, as in myapp:app, or MODULE:MAKE(), as in myapp:make()"),
    ],
)
def test_a_function_that_makes_no_app_is_one_line(tmp_path: Path, reference: str, problem: str) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    done = run(reference, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert problem.format(tmp_path) in done.stderr


def test_a_function_makes_the_app(tmp_path: Path) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    done = run("--check", "--listen", "127.0.0.1:0", "--assume-tls", "factories:make()", cwd=tmp_path)
    assert "factories:make(): no client can send mail" in done.stderr  # its own problem: it wants AUTH, and has no users
