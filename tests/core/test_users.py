"""Users in a file, and the program that lets them in."""

from __future__ import annotations

import os
import pty
import smtplib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi, users
from fumi_core.testing import running
from tests.starter import finished

PROGRAM = str(Path(sys.executable).with_name("fumi-core"))


def test_a_password_is_known_by_its_hash_alone() -> None:
    hashed = users.hash_password("sécret: $")
    assert users.check_password("sécret: $", hashed)
    assert not users.check_password("secret", hashed)
    assert hashed != users.hash_password("sécret: $")


def test_users_of_the_file_are_let_in(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text(f"# people\n\njoe@b.example:{users.hash_password('one')}\nann:{users.hash_password('two')}\n")
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2).use(users.Users(str(path)))
    with running(app) as server:
        for name, password, code in (("joe@b.example", "one", 235), ("ann", "two", 235), ("ann", "one", 535), ("eve", "", 535)):
            with smtplib.SMTP("127.0.0.1", server.port) as smtp:
                smtp.ehlo()
                smtp.user, smtp.password = name, password
                assert smtp.auth("PLAIN", smtp.auth_plain)[0] == code if code == 235 else _refused(smtp)


def _refused(smtp: smtplib.SMTP) -> bool:
    with pytest.raises(smtplib.SMTPAuthenticationError):
        smtp.auth("PLAIN", smtp.auth_plain)
    return True


def test_an_unknown_name_costs_a_check_too(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "users").write_text("")
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2).use(users.Users(str(tmp_path / "users")))
    checked: list[str] = []
    real = users.check_password
    monkeypatch.setattr(users, "check_password", lambda password, hashed: checked.append(hashed) or real(password, hashed))
    with running(app) as server, smtplib.SMTP("127.0.0.1", server.port) as smtp:
        smtp.ehlo()
        smtp.user, smtp.password = "eve", "x"
        assert _refused(smtp)
    assert len(checked) == 1


@pytest.mark.parametrize("line", ["joe", "joe:plaintext", ":" + users.hash_password("x"), "joe:$scrypt$ln=14,r=8,p=1$$"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "users").write_text("# one\n" + line + "\n")
    done = finished("fumi-core", "--users", "users", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: --users: users:2: ")


def test_hash_password_reads_a_line(tmp_path: Path) -> None:
    done = finished("fumi-core", "--hash-password", given="secret\n")
    assert done.returncode == 0
    assert users.check_password("secret", done.stdout.strip())


def test_hash_password_without_an_input_is_one_line() -> None:
    done = subprocess.run(["bash", "-c", 'exec "$0" --hash-password 0<&-', PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: --hash-password: there is no password to read\n"


def test_hash_password_asks_on_a_terminal() -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, "--hash-password"], stdin=child, stdout=subprocess.PIPE, stderr=child, start_new_session=True
    )
    os.close(child)
    asked = b""
    for _ in range(2):
        while not asked.endswith(b": "):
            asked += os.read(parent, 1000)
        asked = b""
        os.write(parent, b"secret\n")
    assert process.stdout is not None
    assert users.check_password("secret", process.stdout.read().decode().strip())
    assert process.wait(30) == 0
    os.close(parent)


def test_auth_required_without_users_is_refused(tmp_path: Path) -> None:
    done = finished("fumi-core", "--auth-required", cwd=tmp_path)
    assert done.returncode == 2
    assert "--users" in done.stderr
