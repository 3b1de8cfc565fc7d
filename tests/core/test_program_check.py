"""fumi-core --check."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

from tests.core.programs import run


def test_check_prints_that_the_configuration_is_ok_and_ends(tmp_path: Path) -> None:
    done = run("--check", "--listen", "127.0.0.1:0", "--deliver", "discard:", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "configuration OK\n")


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
        assert done.stderr.startswith(f"Error: never:{name}: no client can send mail: authentication is required")
        assert problem in done.stderr
    assert run(*check, "never:open_to_all", cwd=tmp_path).returncode == 0
    assert run(*check, "--assume-tls", "never:plaintext", cwd=tmp_path).returncode == 0


def test_check_creates_no_maildir_and_names_the_user_that_will(tmp_path: Path) -> None:
    flags = ("--check", "--listen", "127.0.0.1:0", "--deliver", "maildir:mail/box")
    done = run(*flags, cwd=tmp_path)
    user = pwd.getpwuid(os.getuid()).pw_name
    assert done.stdout == f"maildir:mail/box does not exist yet: user {user} will create it\nconfiguration OK\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mail").touch()
    done = run(*flags, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--deliver maildir:mail/box: does not exist, and user {user} cannot create it in {tmp_path / 'mail'}" in done.stderr


def test_check_accepts_a_maildir_that_exists(tmp_path: Path) -> None:
    for name in ("tmp", "new", "cur"):
        (tmp_path / "maildir" / name).mkdir(parents=True)
    done = run("--check", "--listen", "127.0.0.1:0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "configuration OK\n")


def test_check_takes_the_name_of_a_socket_that_systemd_passes_to_the_service_alone(tmp_path: Path) -> None:
    done = run("--check", "--listen", "fd:core", "--deliver", "discard:", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "configuration OK\n")


def test_check_fails_for_every_address_that_cannot_be_listened_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for addresses, problem in (
        (["192.0.2.1:25"], "--listen 192.0.2.1:25: Cannot assign requested address (this machine has no such address)"),
        ([f"unix:{tmp_path}/none/sock"], f"--listen unix:{tmp_path}/none/sock: the directory {tmp_path}/none does not exist"),
        (["unix:file"], "--listen unix:file: the file exists and is not a socket"),
        (["fd:77"], "--listen fd:77: descriptor 77 is not an open socket"),
        (["127.0.0.1:2525"] * 2, "--listen 127.0.0.1:2525 is given twice: remove one"),
        (["fd:77", "unix:file"], "not an open socket; --listen unix:file: the file exists"),
    ):
        flags = [each for address in addresses for each in ("--listen", address)]
        done = run("--check", *flags, "--deliver", "discard:", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert problem in done.stderr
