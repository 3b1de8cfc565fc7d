"""Users in a file, and the program that lets them in."""

from __future__ import annotations

import hashlib
import hmac
import os
import pty
import smtplib
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest

from fumi_core import Fumi
from fumi_core.program import users
from fumi_core.smtp.sasl import Credentials
from fumi_core.testing import running
from tests.core.programs import PROGRAM
from tests.support.starter import finished


def hashed(password: str, *, log_n: int) -> str:
    """A hash that takes no time."""
    salt = b"s" * 16
    digest = hashlib.scrypt(password.encode(), salt=salt, n=1 << log_n, r=8, p=1, dklen=32)
    return f"$scrypt$ln={log_n},r=8,p=1${b64encode(salt).decode()}${b64encode(digest).decode()}"


def write_users(directory: Path, **hashes: str) -> str:
    path = directory / "users"
    path.write_text("".join(f"{name}:{each}\n" for name, each in hashes.items()))
    return str(path)


def authenticate(port: int, name: str, password: str) -> int:
    """The code of the reply to AUTH PLAIN, which smtplib would not send in UTF-8."""
    with smtplib.SMTP("127.0.0.1", port) as smtp:
        smtp.ehlo()
        return smtp.docmd("AUTH", "PLAIN " + b64encode(f"\0{name}\0{password}".encode()).decode())[0]


def test_a_password_is_known_by_its_hash_alone() -> None:
    hashed = users.hash_password("sécret: $")
    assert users.check_password("sécret: $", hashed)
    assert not users.check_password("secret", hashed)
    assert hashed != users.hash_password("sécret: $")


def test_users_of_the_file_can_log_in(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("password", ["", "x", "p\u00e4sswort"])
def test_every_check_costs_the_same_whether_there_is_such_a_user_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    """What a check computes is what tells, in milliseconds, who is there."""
    path = write_users(tmp_path, strong=hashed("one", log_n=3), weak=hashed("two", log_n=2), other=hashed("three", log_n=2))
    app = Fumi(allow_insecure_auth=True, max_errors=100, close_timeout=0.2).use(users.Users(path))
    computed: list[tuple[int, ...]] = []
    real = users._scrypt

    def scrypt(text: str, salt: bytes, *cost: int) -> bytes:
        computed.append(cost)
        return real(text, salt, *cost)

    monkeypatch.setattr(users, "_scrypt", scrypt)
    seen = []
    with running(app) as server:
        for name in ("strong", "weak", "other", "nobody"):
            assert authenticate(server.port, name, password) == 535
            seen.append(computed[:])
            computed.clear()
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert set(seen[0]) == {users.Cost(2, 8, 1), users.Cost(3, 8, 1)}


def test_users_with_hashes_of_several_costs_can_log_in(tmp_path: Path) -> None:
    path = write_users(tmp_path, strong=hashed("one", log_n=3), weak=hashed("two", log_n=2))
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2).use(users.Users(path))
    with running(app) as server:
        answers = [authenticate(server.port, *each) for each in (("strong", "one"), ("weak", "two"), ("weak", "one"))]
    assert answers == [235, 235, 535]


def test_a_hash_by_passlib_has_no_padding(tmp_path: Path) -> None:
    line = "$scrypt$ln=4,r=8,p=1$" + hashed("one", log_n=4).split("$", 3)[3].replace("=", "")
    assert "=" not in line.rpartition("p=1")[2]
    assert users.check_password("one", line)
    assert not users.check_password("two", line)


FORMS = {
    "p\u00e4ss\u00a0wort": ["pa\u0308ss wort", "p\u00e4ss\u3000wort", "pa\u0308ss\u00a0wo\u00adrt"],
    "\ufb01sh": ["fish", "\uff46ish"],
}


@pytest.mark.parametrize("password", FORMS)
def test_a_password_in_another_unicode_form_is_the_same_password(password: str) -> None:
    others = FORMS[password]
    for made in (password, *others):
        hashed = users.hash_password(made)
        for typed in (password, *others):
            assert users.check_password(typed, hashed)
            assert Credentials("PLAIN", "joe", password=typed).validate_password(made)
        assert not users.check_password(password + "x", hashed)
        assert not Credentials("PLAIN", "joe", password=password + "x").validate_password(made)


@pytest.mark.parametrize(
    ("known", "typed"), [("pa\u0308ss", "p\u00e4ss"), ("p\u00e4ss", "p\u00e4ss"), ("pa\u0308ss", "pa\u0308ss")]
)
def test_cram_md5_takes_the_prepared_form_of_a_password_and_its_own(known: str, typed: str) -> None:
    response = hmac.new(typed.encode(), b"<1@mx>", "md5").hexdigest()
    given = Credentials("CRAM-MD5", "joe", challenge="<1@mx>", challenge_response=response)
    assert given.validate_password(known)
    assert not given.validate_password("other")


def test_a_hash_of_a_password_as_it_was_typed_still_holds(tmp_path: Path) -> None:
    """Others' programs do not prepare what they hash."""
    assert users.check_password("\ufb01sh", hashed("\ufb01sh", log_n=4))


def test_a_name_in_another_unicode_form_is_the_same_user(tmp_path: Path) -> None:
    (tmp_path / "users").write_text(f"ju\u0308rgen:{hashed('one', log_n=4)}\n")
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2).use(users.Users(str(tmp_path / "users")))
    with running(app) as server:
        assert authenticate(server.port, "j\u00fcrgen", "one") == 235


@pytest.mark.parametrize("method", ["XOAUTH2", "CRAM-MD5"])
def test_where_no_password_is_sent_an_empty_one_is_not_taken_for_it(tmp_path: Path, method: str) -> None:
    path = write_users(tmp_path, joe=hashed("", log_n=4))
    app = Fumi(allow_insecure_auth=True, auth_methods=("XOAUTH2", "CRAM-MD5"), close_timeout=0.2).use(users.Users(path))
    given = {"XOAUTH2": "user=joe\x01auth=Bearer x\x01\x01", "CRAM-MD5": "joe 00"}[method]
    with running(app) as server, smtplib.SMTP("127.0.0.1", server.port) as smtp:
        smtp.ehlo()
        with pytest.raises(smtplib.SMTPAuthenticationError):
            smtp.auth(method, lambda challenge=None: given, initial_response_ok=method == "XOAUTH2")


SALT_AND_HASH = hashed("x", log_n=4).split("p=1$")[1]
WRONG_LINES = {
    "joe": "not NAME:HASH",
    "joe:plaintext": "not a scrypt hash",
    ":" + hashed("x", log_n=4): "not NAME:HASH",
    "joe:$scrypt$ln=14,r=8,p=1$$": "not a scrypt hash",
    "joe :" + hashed("x", log_n=4): "a space",
    " joe:" + hashed("x", log_n=4): "a space",
    "joe: " + hashed("x", log_n=4): "a space",
    "jo\0e:" + hashed("x", log_n=4): "'jo\\x00e' contains an invisible character",
    "jo\u200be:" + hashed("x", log_n=4): "'jo\\u200be' contains an invisible character",
    f"joe:$scrypt$ln=0,r=8,p=1${SALT_AND_HASH}": "its cost is not valid for scrypt",
    f"joe:$scrypt$ln=14,r=0,p=1${SALT_AND_HASH}": "its cost is not valid for scrypt",
    f"joe:$scrypt$ln=14,r=8,p=0${SALT_AND_HASH}": "its cost is not valid for scrypt",
    f"joe:$scrypt$ln=16,r=1,p=1${SALT_AND_HASH}": "its cost is not valid for scrypt",
    f"joe:$scrypt$ln=19,r=8,p=1${SALT_AND_HASH}": "its cost is too high",
    f"joe:$scrypt$ln=99,r=99,p=99${SALT_AND_HASH}": "its cost is too high",
    f"joe:$scrypt$ln=14,r=8,p=99${SALT_AND_HASH}": "its cost is too high",
    "joe:" + hashed("x", log_n=4)[:-2]: "the hash has 31 bytes instead of 32",
    "joe:" + hashed("x", log_n=4)[:-3]: "not base64",
}


@pytest.mark.parametrize(("line", "reason"), WRONG_LINES.items(), ids=range(len(WRONG_LINES)))
def test_a_wrong_line_is_named_by_check(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "users").write_text("# one\n" + line + "\n")
    done = finished("fumi-core", "--users", "users", "--check", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: --users: users:2: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["", "\ufeff", "# nobody\n\n"])
def test_a_file_without_users_is_a_warning_and_no_login_succeeds(tmp_path: Path, text: str) -> None:
    (tmp_path / "users").write_text(text)
    done = finished("fumi-core", "--users", "users", "--check", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.endswith("WARNING fumi.core no users in the file: nobody can log in file=users\n")
    assert done.stderr.count("\n") == 1
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2).use(users.Users(str(tmp_path / "users")))
    with running(app) as server:
        assert authenticate(server.port, "joe", "") == 535


def test_a_file_that_is_not_text_or_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"jos\xe9:x\n")
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("latin", "the file is not UTF-8 text"), ("fifo", "it is not a regular file")):
        done = finished("fumi-core", "--users", name, "--check", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"Error: --users {name}: {reason}\n")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_other_line_ends_do_no_harm(tmp_path: Path, end: str) -> None:
    line = f"joe:{hashed('one', log_n=4)}"
    (tmp_path / "users").write_bytes(f"\ufeff{line}{end}# more{end}{line.replace('joe', 'ann')}".encode())
    assert list(users.read(str(tmp_path / "users"))) == ["joe", "ann"]
    (tmp_path / "users").write_bytes(f"\ufeff# people{end}{line}{end}".encode())
    assert list(users.read(str(tmp_path / "users"))) == ["joe"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"\n", "the password is empty"),
        (b"secr\xe9t\n", "the password is not UTF-8 text"),
        (b"a\0b\n", "a password cannot contain a NUL character"),
    ],
)
def test_hash_password_refuses_what_no_client_can_send(given: bytes, reason: str) -> None:
    done = finished("fumi-core", "--hash-password", given=given)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: --hash-password: {reason}\n")


def test_hash_password_reads_a_line(tmp_path: Path) -> None:
    done = finished("fumi-core", "--hash-password", given="secret\n")
    assert done.returncode == 0
    assert users.check_password("secret", done.stdout.strip())


def test_hash_password_without_an_input_is_one_line() -> None:
    done = subprocess.run(["bash", "-c", 'exec "$0" --hash-password 0<&-', PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: --hash-password: the password is empty\n"


def test_hash_password_prompts_on_a_terminal() -> None:
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
