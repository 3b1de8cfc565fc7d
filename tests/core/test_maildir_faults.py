"""What a disk, a file system or a cancellation does to a delivery: the reply and new/ agree, and nothing is overwritten."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from fumi_core import Fumi
from fumi_core.delivery import maildir, maildir_files, maildir_writer
from fumi_core.program import builtin
from fumi_core.server.observer import Observer
from fumi_core.testing import running
from tests.core.client import Client, Connect
from tests.support.waiting import until

LONG_AGO = time.time() - maildir_files.STALE_SECONDS - 60


class Deliveries(Observer):
    def __init__(self) -> None:
        self.results: list[str] = []

    def delivery(self, target: str, result: str) -> None:
        self.results.append(result)


@pytest.fixture(params=["one for all", "one for each"])
def box(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The Maildir of everybody, or the recipient's: the faults are the same."""
    if request.param == "one for all":
        return tmp_path / "box"
    for folder in ("tmp", "new", "cur"):
        (tmp_path / "c@d.example" / "box" / folder).mkdir(parents=True)
    return tmp_path / "c@d.example" / "box"


@pytest.fixture
def box_of_all(tmp_path: Path) -> Path:
    return tmp_path / "box"


def build(box: Path, observer: Observer | None = None, **options: Any) -> Fumi:
    target = str(box).replace("c@d.example", "%u")
    return builtin.build(f"maildir:{target}", name="mx.example", observer=observer, **{"close_timeout": 0.2, **options})


def files(box: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in box.glob("*/*"))


def deliver(client: Client, text: str = "Subject: hi") -> bytes:
    client.envelope()
    assert client.say("DATA").startswith(b"354")
    return client.say(f"{text}\r\n.")


class Held:
    """A system call that waits for ``release``, before or after it does its work."""

    def __init__(self, real: Callable[..., Any], *, before: bool, turn: int) -> None:
        self.reached, self.release = threading.Event(), threading.Event()
        self._real, self._before, self._turn = real, before, turn

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self._turn -= 1
        if self._turn or self.release.is_set():
            return self._real(*arguments, **more)
        if self._before:
            self._wait()
        result = self._real(*arguments, **more)
        if not self._before:
            self._wait()
        return result

    def _wait(self) -> None:
        self.reached.set()
        assert self.release.wait(60)


class Hold(Protocol):
    """Makes the call of ``os`` of this name wait, the ``turn``th time that it is called."""

    def __call__(self, call: str, *, before: bool, turn: int = 1) -> Held: ...


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    held: list[Held] = []
    monkeypatch.setattr(maildir_writer, "WITHDRAW_TIMEOUT", 0.0)

    def make(call: str, *, before: bool, turn: int = 1) -> Held:
        held.append(Held(getattr(os, call), before=before, turn=turn))
        monkeypatch.setattr(f"fumi_core.delivery.maildir.os.{call}", held[-1])
        return held[-1]

    yield make
    for each in held:
        each.release.set()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("call", "turn"), [("open", 1), ("write", 1), ("fsync", 1), ("link", 1), ("fsync", 2)])
def test_a_delivery_that_is_cancelled_in_a_slow_call_is_withdrawn(
    box: Path, connect: Connect, hold: Hold, call: str, turn: int, before: bool
) -> None:
    observer = Deliveries()
    app = build(box, observer)
    with running(app) as server:
        client = connect(server.port)
        slow = hold(call, before=before, turn=turn)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"Subject: hi\r\n.\r\n")
        assert slow.reached.wait(60)
        server.run(app.close)
        assert client.reply().startswith(b"421 ")
        assert client.reply() == b""
        slow.release.set()
        until(lambda: files(box) == [])
        assert observer.results == ["deferred"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("call", "turn"), [("open", 2), ("write", 1), ("fsync", 2), ("link", 1), ("link", 2), ("fsync", 4)])
def test_copies_that_are_cancelled_in_a_slow_call_are_all_withdrawn(
    tmp_path: Path, connect: Connect, hold: Hold, call: str, turn: int, before: bool
) -> None:
    boxes = [tmp_path / name / "box" for name in ("c@d.example", "e@f.example")]
    for path in (box / folder for box in boxes for folder in ("tmp", "new", "cur")):
        path.mkdir(parents=True)
    observer = Deliveries()
    app = build(boxes[0], observer)
    with running(app) as server:
        client = connect(server.port)
        slow = hold(call, before=before, turn=turn)
        client.envelope("a@b.example", "c@d.example", "e@f.example")
        client.say("DATA")
        client.sock.sendall(b"Subject: hi\r\n.\r\n")
        assert slow.reached.wait(60)
        server.run(app.close)
        assert client.reply().startswith(b"421 ")
        assert client.reply() == b""
        slow.release.set()
        until(lambda: [files(box) for box in boxes] == [[], []])
        assert observer.results == ["deferred"]


def test_a_stop_waits_until_a_delivery_is_withdrawn(
    box: Path, connect: Connect, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(build(box)) as server:
        client = connect(server.port)
        slow = hold("link", before=False)
        monkeypatch.setattr(maildir_writer, "WITHDRAW_TIMEOUT", 60.0)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"Subject: hi\r\n.\r\n")
        assert slow.reached.wait(60)
        closing = threading.Thread(target=server.run, args=(server.app.close,))
        closing.start()
        assert client.reply().startswith(b"421 ")
        assert client.reply() == b""
        assert len(files(box)) == 2
        slow.release.set()
        closing.join()
        assert files(box) == []


def test_a_delivery_that_waits_for_a_thread_when_it_is_cancelled_never_starts(
    box: Path, connect: Connect, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maildir_writer, "THREADS", 1)
    app = build(box)
    with running(app) as server:
        first, second = connect(server.port), connect(server.port)
        assert deliver(first).startswith(b"250")
        (delivered,) = files(box)
        slow = hold("write", before=True)
        for client in (first, second):
            client.envelope()
            client.say("DATA")
            client.sock.sendall(b"Subject: hi\r\n.\r\n")
        assert slow.reached.wait(60)
        server.run(app.close)
        assert [client.reply()[:4] for client in (first, second)] == [b"421 "] * 2
        slow.release.set()
        until(lambda: files(box) == [delivered])


@pytest.mark.parametrize("folder", ["tmp", "new"])
def test_a_name_that_exists_is_not_used_again(box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    names = iter(["one", "one", "two", "three"])
    with running(build(box)) as server:
        monkeypatch.setattr(maildir_files.MaildirDirectory, "unique_name", lambda self: next(names))
        (box / folder / "one").write_bytes(b"somebody's")
        reply = deliver(connect(server.port))
    assert reply == b"250 2.0.0 Ok: queued as two\r\n"
    assert (box / folder / "one").read_bytes() == b"somebody's"
    assert files(box) == sorted([f"{folder}/one", "new/two"])


def test_where_every_name_exists_the_message_is_deferred(box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(build(box)) as server:
        monkeypatch.setattr(maildir_files.MaildirDirectory, "unique_name", lambda self: "one")
        client = connect(server.port)
        assert deliver(client, "Subject: first") == b"250 2.0.0 Ok: queued as one\r\n"
        assert deliver(client, "Subject: second") == b"451 4.3.0 Mail store error\r\n"
    assert files(box) == ["new/one"]
    assert b"first" in (box / "new" / "one").read_bytes()


def test_a_link_whose_confirmation_was_lost_counts(box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    with running(build(box)) as server:
        monkeypatch.setattr("fumi_core.delivery.maildir.os.link", link)
        name = deliver(connect(server.port)).split()[-1].decode()
    assert files(box) == [f"new/{name}"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_message_is_renamed_but_over_nothing(
    box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    names = iter(["one", "one", "two"])

    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    with running(build(box)) as server:
        monkeypatch.setattr(maildir_files.MaildirDirectory, "unique_name", lambda self: next(names))
        monkeypatch.setattr("fumi_core.delivery.maildir.os.link", link)
        client = connect(server.port)
        assert deliver(client, "Subject: first") == b"250 2.0.0 Ok: queued as one\r\n"
        assert deliver(client, "Subject: second") == b"250 2.0.0 Ok: queued as two\r\n"
    assert files(box) == ["new/one", "new/two"]
    assert b"first" in (box / "new" / "one").read_bytes()


def test_a_remainder_that_cannot_be_removed_hides_neither_reason_nor_result(
    box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Deliveries()

    def fail(number: int) -> Callable[..., None]:
        def call(*arguments: object, **more: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    with running(build(box, observer)) as server:
        client = connect(server.port)
        with monkeypatch.context() as patch:
            patch.setattr("fumi_core.delivery.maildir.os.fsync", fail(errno.ENOSPC))
            patch.setattr("fumi_core.delivery.maildir.Path.unlink", fail(errno.EIO))
            assert deliver(client) == b"452 4.3.1 Insufficient system storage\r\n"
    assert observer.results == ["deferred"]
    lines = [line for record in caplog.records if (line := record.getMessage()).startswith("cannot")]
    assert [line.split(" id=")[0] for line in lines] == ["cannot deliver", "cannot remove message file"]
    assert "No space left" in lines[0]
    assert "Traceback" not in caplog.text


def test_a_system_without_a_thread_to_spare_defers_the_message(
    box_of_all: Path, connect: Connect, hold: Hold, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    # The thread that looks for remains would be one to spare.
    monkeypatch.setattr(maildir.Maildir, "_clean", lambda self: None)

    with running(build(box_of_all)) as server:
        first, second = connect(server.port), connect(server.port)
        slow = hold("write", before=True)
        first.envelope()
        first.say("DATA")
        first.sock.sendall(b"Subject: hi\r\n.\r\n")
        assert slow.reached.wait(60)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            assert deliver(second) == b"451 4.3.0 Mail store error\r\n"
        slow.release.set()
        assert first.reply().startswith(b"250")
        assert deliver(second).startswith(b"250")
    # What was queued for the thread that did not start came to nothing, too.
    assert len(files(box_of_all)) == 2
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_directories_that_cannot_be_fsynced_are_one_warning(
    box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def sync(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(maildir_files, "_sync_directory", sync)
    with running(build(box)) as server:
        client = connect(server.port)
        assert deliver(client).startswith(b"250")
        assert deliver(client).startswith(b"250")
    assert len(files(box)) == 2
    assert [record.levelname for record in caplog.records if "fsync" in record.getMessage()] == ["WARNING"]


def test_a_directory_that_the_disk_does_not_sync_is_an_error_all_the_same(
    box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(build(box)) as server:

        def sync(path: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(maildir_files, "_sync_directory", sync)
        assert deliver(connect(server.port)) == b"451 4.3.0 Mail store error\r\n"
    assert files(box) == []


def test_unfinished_deliveries_are_removed_after_36_hours(box_of_all: Path) -> None:
    app = build(box_of_all)
    for folder, name, age in (
        ("tmp", "old", LONG_AGO), ("tmp", "young", LONG_AGO + 7200), ("tmp", ".nfs0001", LONG_AGO), ("new", "mail", LONG_AGO),
    ):  # fmt: skip
        (box_of_all / folder / name).touch()
        os.utime(box_of_all / folder / name, (age, age))
    (box_of_all / "tmp" / "folder").mkdir()
    (box_of_all / "tmp" / "link").symlink_to(box_of_all / "new" / "mail")
    os.utime(box_of_all / "tmp" / "folder", (LONG_AGO, LONG_AGO))
    os.utime(box_of_all / "tmp" / "link", (LONG_AGO, LONG_AGO), follow_symlinks=False)
    with running(app):
        until(lambda: "tmp/old" not in files(box_of_all))
    assert files(box_of_all) == ["new/mail", "tmp/.nfs0001", "tmp/folder", "tmp/link", "tmp/young"]


def test_unfinished_deliveries_are_looked_for_now_and_then(
    box_of_all: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maildir, "CLEAN_INTERVAL", 0.0)
    with running(build(box_of_all)) as server:
        (box_of_all / "tmp" / "old").touch()
        os.utime(box_of_all / "tmp" / "old", (LONG_AGO, LONG_AGO))
        assert deliver(connect(server.port)).startswith(b"250")
        until(lambda: "tmp/old" not in files(box_of_all))
        assert len(files(box_of_all)) == 1
