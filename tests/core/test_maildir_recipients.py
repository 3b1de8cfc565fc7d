"""A Maildir for each recipient: who exists, whose path it is, and that 250 means all of them."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core import DataContext, Fumi, Next
from fumi_core.delivery import maildir, maildir_files, parse_target
from fumi_core.delivery.maildir_recipients import MaildirTemplate, RecipientMaildirs
from fumi_core.program import builtin
from fumi_core.server.observer import Observer
from fumi_core.smtp.grammar import Address
from fumi_core.testing import running
from tests.core.client import Client, Connect
from tests.core.programs import Start, run
from tests.support.ports import free_port
from tests.support.readme import ROOT

UNKNOWN = b"550 5.1.1 Recipient address rejected: User unknown\r\n"
TEMPORARY = b"451 4.3.0 Recipient address rejected: Temporary lookup failure\r\n"
OK = b"250 2.1.5 Ok\r\n"


class Deliveries(Observer):
    def __init__(self) -> None:
        self.results: list[str] = []

    def delivery(self, target: str, result: str) -> None:
        assert target == "maildir"
        self.results.append(result)


def users(mail: Path) -> Path:
    """A directory with users joe, ann and bob at d.example."""
    for name in ("joe", "ann", "bob"):
        (mail / "d.example" / name).mkdir(parents=True)
    return mail


@pytest.fixture
def mail(tmp_path: Path) -> Path:
    return users(tmp_path / "mail")


@pytest.fixture
def open_mail() -> Iterator[Path]:
    """The same, where every user may come: pytest's directories are for their owner alone."""
    with tempfile.TemporaryDirectory(prefix="fumi-mail-") as directory:
        Path(directory).chmod(0o755)
        yield users(Path(directory) / "mail")


def build(mail: Path, observer: Observer | None = None, **options: Any) -> Fumi:
    usual = {"name": "d.example", "close_timeout": 0.2, "lenient_addresses": True}
    return builtin.build(f"maildir:{mail}/%d/%n/Maildir", observer=observer, **{**usual, **options})


def ready(client: Client, hello: str = "EHLO") -> Client:
    client.say(f"{hello} client.example")
    assert client.say("MAIL FROM:<a@b.example> SMTPUTF8").startswith(b"250")
    return client


def deliver(client: Client, *recipients: str, text: str = "Subject: hi") -> bytes:
    client.envelope("a@b.example", *recipients)
    assert client.say("DATA").startswith(b"354")
    return client.say(f"{text}\r\n.")


def stored(mail: Path, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((mail / "d.example" / name / "Maildir" / "new").glob("*"))]


def left_over(mail: Path) -> list[Path]:
    return [path for path in mail.rglob("*") if path.is_file()]


def test_each_recipient_gets_a_copy_that_names_it_alone(mail: Path, connect: Connect) -> None:
    observer = Deliveries()
    with running(build(mail, observer)) as server:
        reply = deliver(connect(server.port), "joe@d.example", "Ann@D.Example", "joe+news@d.example")
    (joes,), (anns,) = stored(mail, "joe"), stored(mail, "ann")
    assert joes.startswith(
        b"Return-Path: <a@b.example>\nDelivered-To: joe@d.example\nDelivered-To: joe+news@d.example\nReceived: "
    )
    assert anns.startswith(b"Return-Path: <a@b.example>\nDelivered-To: Ann@D.Example\nReceived: ")
    assert stored(mail, "bob") == []
    assert reply.startswith(b"250 2.0.0 Ok: queued as ")
    assert observer.results == ["ok"]


@pytest.mark.parametrize("size", [0, 1, 70_000, 1_000_000])
def test_copies_of_any_size_arrive_byte_for_byte(mail: Path, connect: Connect, size: int) -> None:
    text = "\r\n".join(["Subject: hi", "", *["x" * 60] * (size // 60)])
    with running(build(mail)) as server:
        assert deliver(connect(server.port), "joe@d.example", "ann@d.example", text=text).startswith(b"250")
    for name in ("joe", "ann"):
        (message,) = stored(mail, name)
        assert message.endswith(f"\n{text}\n".replace("\r\n", "\n").encode())


@pytest.mark.parametrize(
    ("recipient", "reply"),
    [
        ("joe@d.example", OK),
        ("JOE@D.EXAMPLE", OK),
        ("joe+x@d.example", OK),
        ('"joe"@d.example', OK),
        ("joe", OK),  # a lenient address: this host's
        ("eve@d.example", UNKNOWN),
        ("joe@other.example", UNKNOWN),
        ("postmaster", UNKNOWN),
        ("+joe@d.example", UNKNOWN),
        ('""@d.example', UNKNOWN),
        ('"."@d.example', UNKNOWN),
        ('".."@d.example', UNKNOWN),
        ("..@d.example", UNKNOWN),
        ('"../joe"@d.example', UNKNOWN),
        ('"joe/../ann"@d.example', UNKNOWN),
        ('"/etc"@d.example', UNKNOWN),
        ('"joe/"@d.example', UNKNOWN),
        ('".+x"@d.example', UNKNOWN),
        ('"..+x"@d.example', UNKNOWN),
        ('".\\."@d.example', UNKNOWN),
        ("x" * 240 + "@d.example", UNKNOWN),
        ("%n@d.example", UNKNOWN),
        ("joe@[192.0.2.1]", UNKNOWN),
    ],
)
def test_a_recipient_exists_if_its_directory_does_and_no_name_becomes_another_path(
    mail: Path, connect: Connect, recipient: str, reply: bytes
) -> None:
    (mail / "d.example" / "file").touch()
    with running(build(mail)) as server:
        assert ready(connect(server.port)).say(f"RCPT TO:<{recipient}>") == reply
    assert sorted(path.name for path in mail.rglob("*")) == sorted(["d.example", "file", "joe", "ann", "bob"])


@pytest.mark.parametrize(
    ("template", "recipient", "base", "path"),
    [
        ("/srv/%d/%n/Maildir", "Joe+x@D.example", "/srv/d.example/joe", "/srv/d.example/joe/Maildir"),
        ("/srv/%u", "joe+x@d.example", "/srv/joe@d.example", "/srv/joe@d.example"),
        ("/srv/box-%n-%d/a/b", "joe@d.example", "/srv/box-joe-d.example", "/srv/box-joe-d.example/a/b"),
        ("%n", "joe@d.example", "joe", "joe"),
        ("/50%%/%n", "joe@d.example", "/50%/joe", "/50%/joe"),
        ("/%n", "%d@d.example", "/%d", "/%d"),
        ("/%d", "joe", "/host.example", "/host.example"),
        ("/%d/%n", "j\u00f6e@B\u00dcCHER.example", "/xn--bcher-kva.example/j\u00f6e", "/xn--bcher-kva.example/j\u00f6e"),
        ("/%n", "jo\u0308e@d.example", "/j\u00f6e", "/j\u00f6e"),
    ],
)
def test_the_variables_are_the_address_its_local_part_and_its_domain(template: str, recipient: str, base: str, path: str) -> None:
    assert RecipientMaildirs(template, "+")._paths(recipient, "host.example") == (Path(base), Path(path))


@pytest.mark.parametrize("value", ["", ".", "..", ".x", "a/b", "/", "a\0", "a\n", "\x7f", "\u2028", "\ud800"])
def test_values_that_are_no_file_names_have_no_path(value: str) -> None:
    for name in "und":
        assert MaildirTemplate(f"/srv/%{name}").paths({"u": "u", "n": "n", "d": "d", name: value}) is None


@pytest.mark.parametrize("target", ["/srv/%x/%n", "/srv/%n%", "/srv/%%n"])
def test_an_unknown_variable_is_an_error(target: str) -> None:
    with pytest.raises(ValueError, match="variable"):
        parse_target(f"maildir:{target}")


def test_a_path_without_variables_may_have_percent_signs(tmp_path: Path) -> None:
    assert parse_target(f"maildir:{tmp_path}/50%").check() is not None


def test_without_the_directory_of_all_users_recipients_are_deferred(mail: Path, connect: Connect) -> None:
    """It may be on a file system that is not mounted."""
    with running(build(mail)) as server:
        client = ready(connect(server.port))
        mail.rename(mail.with_name("elsewhere"))
        assert client.say("RCPT TO:<joe@d.example>") == TEMPORARY
        mail.mkdir()
        assert client.say("RCPT TO:<joe@d.example>") == UNKNOWN


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_when_a_directory_cannot_be_looked_up_the_recipient_is_deferred(
    mail: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.stat

    def failing(path: Any, *arguments: Any, **more: Any) -> os.stat_result:
        if str(path).endswith("joe"):
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **more)

    with running(build(mail)) as server:
        client = ready(connect(server.port))
        monkeypatch.setattr("fumi_core.delivery.maildir_recipients.os.stat", failing)
        assert client.say("RCPT TO:<joe@d.example>") == TEMPORARY
        assert client.say("RCPT TO:<ann@d.example>") == OK
    assert len([record for record in caplog.records if "cannot look up recipient" in record.getMessage()]) == 1


def test_a_file_system_that_hangs_defers_the_recipient(
    mail: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(maildir, "LOOKUP_TIMEOUT", 0.1)
    released = threading.Event()
    with running(build(mail)) as server, monkeypatch.context() as patch:
        patch.setattr(RecipientMaildirs, "exists", lambda *arguments: released.wait(60))
        client = ready(connect(server.port))
        assert client.say("RCPT TO:<joe@d.example>") == TEMPORARY
        released.set()
    assert 'to=joe@d.example error="no answer in time"' in caplog.text


def test_a_user_removed_before_the_message_is_deferred_and_nothing_is_created(mail: Path, connect: Connect) -> None:
    with running(build(mail)) as server:
        client = connect(server.port)
        client.envelope("a@b.example", "joe@d.example", "ann@d.example")
        (mail / "d.example" / "joe").rmdir()
        assert client.say("DATA").startswith(b"354")
        assert client.say("hi\r\n.") == b"451 4.3.0 Mail store error\r\n"
    assert left_over(mail) == []
    assert not (mail / "d.example" / "joe").exists()


@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
@pytest.mark.parametrize(
    ("number", "reply"), [(28, b"452 4.3.1 Insufficient system storage\r\n"), (5, b"451 4.3.0 Mail store error\r\n")]
)
def test_if_one_copy_fails_smtp_has_none(
    mail: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, call: str, number: int, reply: bytes
) -> None:
    observer = Deliveries()
    with running(build(mail, observer)) as server:
        client = connect(server.port)
        client.envelope("a@b.example", "joe@d.example", "ann@d.example", "bob@d.example")
        assert client.say("DATA").startswith(b"354")
        with monkeypatch.context() as patch:
            fail_for_ann(patch, call, number)
            assert client.say("hi\r\n.") == reply
        assert left_over(mail) == []
        assert deliver(client, "joe@d.example", "ann@d.example", "bob@d.example").startswith(b"250")
    assert [len(stored(mail, name)) for name in ("joe", "ann", "bob")] == [1, 1, 1]
    assert observer.results == ["deferred", "ok"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
def test_if_one_copy_fails_lmtp_has_the_others(mail: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    observer = Deliveries()
    with running(build(mail, observer, lmtp=True)) as server:
        client = ready(connect(server.port), "LHLO")
        for name in ("joe", "ann", "ann+x", "bob"):
            assert client.say(f"RCPT TO:<{name}@d.example>") == OK
        assert client.say("DATA").startswith(b"354")
        with monkeypatch.context() as patch:
            fail_for_ann(patch, call, 28)
            client.sock.sendall(b"hi\r\n.\r\n")
            replies = [client.reply()[:9] for _ in range(4)]
    assert replies == [b"250 2.0.0", b"452 4.3.1", b"452 4.3.1", b"250 2.0.0"]
    assert [len(stored(mail, name)) for name in ("joe", "ann", "bob")] == [1, 0, 1]
    assert len(left_over(mail)) == 2
    assert observer.results == ["ok"]


def fail_for_ann(patch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Make a system call fail for what concerns ann's files."""
    real, descriptors = getattr(os, call), set[int]()
    real_open = os.open

    def opened(path: Any, *arguments: Any, **more: Any) -> int:
        if call == "open" and "/ann/Maildir/tmp/" in str(path):
            raise OSError(number, os.strerror(number))
        fd = real_open(path, *arguments, **more)
        descriptors.discard(fd)
        if "/ann/Maildir/tmp/" in str(path):
            descriptors.add(fd)
        return fd

    def failing(first: Any, *arguments: Any, **more: Any) -> Any:
        if first in descriptors or "/ann/" in str(first):
            raise OSError(number, os.strerror(number))
        return real(first, *arguments, **more)

    patch.setattr("fumi_core.delivery.maildir_files.os.open", opened)
    if call != "open":
        patch.setattr(f"fumi_core.delivery.maildir_files.os.{call}", failing)


def test_all_copies_are_synced_before_one_is_visible_and_all_directories_before_250(
    mail: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for call in ("fsync", "link"):
        real = getattr(os, call)

        def watched(*arguments: Any, call: str = call, real: Any = real) -> Any:
            steps.append(call)
            return real(*arguments)

        monkeypatch.setattr(f"fumi_core.delivery.maildir_files.os.{call}", watched)
    with running(build(mail)) as server:
        client = connect(server.port)
        deliver(client, "joe@d.example", "ann@d.example")
        steps.clear()
        assert deliver(client, "joe@d.example", "ann@d.example").startswith(b"250")
    assert steps[:2] == ["fsync", "fsync"]
    assert sorted(steps[2:]) == ["fsync", "fsync", "link", "link"]
    assert steps[2] == "link"


def test_a_directory_that_had_to_be_made_is_safe_too(mail: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(maildir_files, "_sync_directory", synced.append)
    with running(build(mail)) as server:
        deliver(connect(server.port), "joe@d.example")
    joe = mail / "d.example" / "joe"
    assert synced == [joe, *[joe / "Maildir"] * 3, joe / "Maildir" / "new"]


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2770, 0o755])
def test_modes_and_owner_are_the_directorys(open_mail: Path, connect: Connect, mode: int) -> None:
    joe, nobody = open_mail / "d.example" / "joe", pwd.getpwnam("nobody")
    owned = os.geteuid() == 0
    if owned:
        os.chown(joe, nobody.pw_uid, nobody.pw_gid)
    joe.chmod(mode)
    before = os.umask(0o077)
    try:
        with running(build(open_mail)) as server:
            assert deliver(connect(server.port), "joe@d.example", "ann@d.example").startswith(b"250")
    finally:
        os.umask(before)
    directories = [joe / "Maildir", *(joe / "Maildir" / name for name in ("tmp", "new", "cur"))]
    (message,) = (joe / "Maildir" / "new").iterdir()
    for path in (*directories, message):
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == (mode & 0o666 if path == message else mode), path
        if owned:
            assert (found.st_uid, found.st_gid) == (nobody.pw_uid, nobody.pw_gid), path
    (anns,) = (open_mail / "d.example" / "ann" / "Maildir" / "new").iterdir()
    assert anns.stat().st_uid == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be misled")
@pytest.mark.parametrize("name", ["tmp", "new", "cur", ""])
def test_a_user_cannot_have_root_write_elsewhere(open_mail: Path, connect: Connect, name: str) -> None:
    """joe replaces a directory of the Maildir by a symbolic link to one that is not joe's."""
    joe, nobody = open_mail / "d.example" / "joe", pwd.getpwnam("nobody")
    roots = open_mail.with_name("root's")
    for folder in ("tmp", "new", "cur"):
        (roots / folder).mkdir(parents=True)
    os.chown(joe, nobody.pw_uid, nobody.pw_gid)
    with running(build(open_mail)) as server:
        assert deliver(connect(server.port), "joe@d.example").startswith(b"250")
        victim = joe / "Maildir" / name
        victim.rename(joe / "moved")
        victim.symlink_to(roots / name)
        reply = deliver(connect(server.port), "joe@d.example")
    assert reply.startswith(b"250" if name == "cur" else b"451")
    assert left_over(roots) == []
    # And what the server does elsewhere it does as root again.
    (roots / "still root").touch()
    assert (roots / "still root").stat().st_uid == 0


def test_remains_of_killed_deliveries_are_removed_by_the_next_one(mail: Path, connect: Connect) -> None:
    tmp = mail / "d.example" / "joe" / "Maildir" / "tmp"
    tmp.mkdir(parents=True)
    (tmp / "old").touch()
    (tmp / "young").touch()
    os.utime(tmp / "old", (1, 1))
    with running(build(mail)) as server:
        assert deliver(connect(server.port), "joe@d.example").startswith(b"250")
    assert [path.name for path in tmp.iterdir()] == ["young"]


def test_a_hundred_recipients_have_a_copy_each_with_few_open_files(mail: Path, connect: Connect) -> None:
    names = [f"user{number}" for number in range(100)]
    for name in names:
        (mail / "d.example" / name).mkdir()
    with running(build(mail)) as server:
        assert deliver(connect(server.port), *(f"{name}@d.example" for name in names)).startswith(b"250")
    assert [len(stored(mail, name)) for name in names] == [1] * 100


def test_a_message_over_the_size_is_in_no_maildir(mail: Path, connect: Connect) -> None:
    with running(build(mail, size=10_000)) as server:
        text = "\r\n".join(["x" * 70] * 1000)
        assert deliver(connect(server.port), "joe@d.example", "ann@d.example", text=text).startswith(b"552")
    assert left_over(mail) == []


def test_extensions_that_a_maildir_cannot_keep_are_not_offered(mail: Path, connect: Connect) -> None:
    with running(build(mail)) as server:
        offered = connect(server.port).say("EHLO client.example")
    assert b"BINARYMIME" not in offered
    assert b"DSN" not in offered


@pytest.mark.parametrize("recipients", [["joe@d.example", "../x@d.example"], ["joe@d.example", "eve@d.example"], []], ids=str)
def test_handlers_recipients_without_a_maildir_are_deferred(mail: Path, connect: Connect, recipients: list[str]) -> None:
    with running(changing(build(mail), *recipients)) as server:
        assert deliver(connect(server.port), "joe@d.example") == b"451 4.3.0 Mail store error\r\n"
    assert left_over(mail) == []


def test_handlers_may_change_message_and_recipients(mail: Path, connect: Connect) -> None:
    app = changing(build(mail), "ann@d.example", "bob@d.example")

    async def other_text(ctx: DataContext, next: Next) -> None:
        ctx.replace(b"Subject: other\r\n\r\n" + b"x" * 300_000)
        await next()

    app.on_data(other_text, first=True)
    with running(app) as server:
        assert deliver(connect(server.port), "joe@d.example").startswith(b"250")
    assert stored(mail, "joe") == []
    for name in ("ann", "bob"):
        (message,) = stored(mail, name)
        assert b"Subject: other\n\nxxx" in message


def test_a_failing_copy_for_a_recipient_that_a_handler_added_defers_all_in_lmtp(
    mail: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = changing(build(mail, lmtp=True), "joe@d.example", "ann@d.example")
    with running(app) as server:
        client = ready(connect(server.port), "LHLO")
        client.say("RCPT TO:<joe@d.example>")
        client.say("DATA")
        fail_for_ann(monkeypatch, "write", 28)
        assert client.say("hi\r\n.").startswith(b"452 4.3.1")


def changing(app: Fumi, *recipients: str) -> Fumi:
    """The same app with these recipients in place of the client's."""

    async def change(ctx: DataContext, next: Next) -> None:
        ctx.session.envelope.rcpt_to = [Address(each, {}) for each in recipients]
        await next()

    app.on_data(change, first=True)
    return app


@pytest.mark.parametrize("kill_after", [0, 3, 17])
def test_a_killed_core_has_kept_all_copies_of_what_it_promised(
    mail: Path, start: Start, connect: Connect, kill_after: int
) -> None:
    port = free_port()
    flags = ["--proxy-protocol", "off", "--deliver", f"maildir:{mail}/%d/%n/Maildir"]
    program = start("--listen", f"127.0.0.1:{port}", *flags)
    client, promised = connect(port), 0
    with contextlib.suppress(ConnectionError, AssertionError):
        while True:
            client.envelope("a@b.example", "joe@d.example", "ann@d.example")
            assert client.say("DATA").startswith(b"354")
            client.sock.sendall(f"Subject: {promised}\r\n\r\n".encode() + (b"x" * 70 + b"\r\n") * 3000 + b".\r\n")
            if promised == kill_after:
                program.process.kill()
            assert client.reply().startswith(b"250")
            promised += 1
    assert promised >= kill_after
    for name in ("joe", "ann"):
        messages = stored(mail, name)
        assert promised <= len(messages) <= promised + 1
        assert all(message.endswith(b"x" * 70 + b"\n") for message in messages)


def test_the_program_takes_the_path_and_the_delimiter(mail: Path, start: Start, connect: Connect) -> None:
    port = free_port()
    flags = ["--proxy-protocol", "off", "--recipient-delimiter", "-"]
    start("--listen", f"127.0.0.1:{port}", "--deliver", f"maildir:{mail}/%d/%n", *flags)
    client = ready(connect(port))
    assert client.say("RCPT TO:<joe-x@d.example>") == OK
    assert client.say("RCPT TO:<joe+x@d.example>") == UNKNOWN


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--deliver", "maildir:mail/%n"], ""),
        (["--deliver", "maildir:mail/%n", "--recipient-delimiter", "+-"], ""),
        (["--deliver", "maildir:mail/%n", "--recipient-delimiter", ""], ""),
        (["--deliver", "maildir:mail/%n", "--recipient-delimiter", "x"], "--recipient-delimiter: "),
        (["--deliver", "maildir:mail", "--recipient-delimiter", "-"], "--recipient-delimiter has no effect"),
        (["--deliver", "discard:", "--recipient-delimiter", "-"], "--recipient-delimiter has no effect"),
        (["--deliver", "maildir:missing/%n"], "--deliver maildir:missing/%n: the directory missing does not exist"),
        (["--deliver", "maildir:mail/%x%n"], "%x is not a variable"),
        (["--recipient-delimiter", "-", "app:app"], "--recipient-delimiter belongs to the built-in app"),
    ],
)
def test_check_names_what_does_not_fit(mail: Path, tmp_path: Path, flags: list[str], reason: str) -> None:
    (tmp_path / "app.py").write_text("from fumi_core import Fumi\napp = Fumi(auth_optional=True)\n")
    done = run("--check", "--listen", "127.0.0.1:0", *flags, cwd=tmp_path)
    assert done.returncode == (2 if reason else 0), done.stderr
    assert reason in done.stderr
    assert done.stderr.count("\n") == bool(reason)


def test_a_start_without_the_directory_of_all_users_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fumi_core", "--listen", "127.0.0.1:0", "--deliver", "maildir:missing/%n"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "the directory missing does not exist" in done.stderr


def test_the_pages_table_of_variables_is_right() -> None:
    page = (ROOT / "fumi_core/PROGRAM.md").read_text()
    rows = re.findall(r"^\| `(%.)` \| `(.*?)`", page, re.MULTILINE)
    assert [variable for variable, _ in rows] == ["%u", "%n", "%d", "%%"]
    for variable, value in rows:
        template = f"/srv/%u/{variable}"
        expected = Path(f"/srv/joe@example.org/{value}")
        paths = RecipientMaildirs(template, "+")._paths("Joe+news@Example.org", "host.example")
        assert paths is not None
        assert paths[1] == expected
