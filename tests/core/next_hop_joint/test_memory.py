"""What the memory of answers keeps and forgets, and what happens where nothing can be remembered."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from fumi_core import Fumi
from fumi_core.delivery.next_hop import reply_store
from fumi_core.delivery.next_hop.target import NextHop
from fumi_core.runtime.addresses import parse_address
from tests.core.client import Connect
from tests.core.next_hop_joint.delivery import FULL, MIXED, OTHER, TEXT, Front, MakeStore, envelope, rows, send


def test_no_room_for_a_message_that_must_be_kept_is_452(
    store: MakeStore, front: Front, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    hop = store(slow="451 4.2.1 Later")
    client = connect(front(hop).port)
    assert send(client, "good", "slow").startswith(MIXED)
    monkeypatch.setattr("fumi_core.handlers.spool.tempfile.TemporaryFile", full)
    large = TEXT + ("x" * 70 + "\r\n") * 10_000
    assert send(client, "good", "slow", text=large) == b"452 4.3.1 Insufficient system storage\r\n"
    del hop.answers["slow"]
    assert send(client, "good", "slow").startswith(b"250 ")


# Where nothing can be remembered


def spoil(state: Path, how: str) -> None:
    if how == "a file":
        state.write_text("")
    elif how == "no database":
        state.mkdir()
        (state / "answers.sqlite3").write_bytes(b"not a database, by any means" * 1000)
    elif how == "another's":
        state.mkdir()
        with sqlite3.connect(state / "answers.sqlite3") as connection:
            connection.execute("CREATE TABLE mine (words TEXT)")
    else:
        state.mkdir()
        (state / "answers.sqlite3").mkdir()


@pytest.mark.parametrize("how", ["a file", "no database", "another's", "a directory"])
def test_without_a_memory_the_start_warns_and_answers_that_differ_are_451_for_all(
    store: MakeStore, front: Front, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    spoil(tmp_path / "state", how)
    hop = store(full=FULL)
    client = connect(front(hop).port)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("cannot store replies that differ")
    for _ in range(2):
        assert send(client, "good", "full").startswith(MIXED)
    assert send(client, "good", "fine").startswith(b"250 ")
    if how == "another's":
        with sqlite3.connect(tmp_path / "state/answers.sqlite3") as connection:
            assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("mine",)]


def test_a_database_that_breaks_later_is_one_warning_and_no_wrong_reply(
    store: MakeStore,
    front: Front,
    connect: Connect,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)

    def full(*arguments: object) -> NoReturn:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(reply_store.ReplyStore, "_open", full)
    monkeypatch.setattr(reply_store.ReplyStore, "_bound", full)
    for _ in range(3):
        assert send(client, "one", "full", text=OTHER, parameters="").startswith(MIXED)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "cannot store replies to recipients" in warnings[0]
    assert send(client, "one", "fine").startswith(b"250 ")
    monkeypatch.undo()
    assert send(client, "good").startswith(b"250 ")
    assert hop.copies_of(TEXT)["good"] == 1


def test_a_moment_without_threads_is_one_warning_and_the_memory_works_after_it(
    store: MakeStore, front: Front, connect: Connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_threads(*arguments: object) -> NoReturn:
        raise OSError("can't start new thread")

    hop = store(full=FULL)
    client = connect(front(hop).port)
    with monkeypatch.context() as patched:
        patched.setattr(reply_store, "start_thread", no_threads)
        assert send(client, "good", "full").startswith(MIXED)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "can't start new thread" in warning
    assert send(client, "other", "full", text=OTHER).startswith(MIXED)
    client.say("QUIT")
    replies = envelope(connect(front(hop).port), "other", "full")
    assert [reply[:9] for reply in replies] == [b"250 2.1.5", b"552 5.2.2"]


def test_a_reload_keeps_the_locks_of_messages_that_are_being_delivered(tmp_path: Path) -> None:
    target = NextHop("lmtp", parse_address("127.0.0.1:24"), tmp_path)
    for _ in range(2):  # the start, and a reload
        Fumi(auth_optional=True).use(target)
        memory = target._memory
        assert memory is not None
        memory._locks.acquire(b"message!")
        assert not _is_free(tmp_path / "locks", b"message!")


def _is_free(path: Path, digest: bytes) -> bool:
    """Whether another process could deliver this message."""
    program = (
        "import pathlib, sys; from fumi_core.delivery.next_hop.message_locks import MessageLocks;"
        f"print(MessageLocks(pathlib.Path({str(path)!r})).is_free({digest!r}))"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "True\n"


def test_only_the_replies_of_one_recipient_are_read_for_it(tmp_path: Path) -> None:
    async def read() -> tuple[list[str], bool]:
        known = reply_store.ReplyStore(tmp_path)
        known.prepare()
        rows = [reply_store.Remembered(f"{n}@d.example", b"digest", b"attempt", 250, "Ok") for n in range(100)]
        await known.record("a@b.example", rows)
        found, empty = await known.of_recipient("a@b.example", "7@d.example")
        known.close()
        return [each.recipient for each in found], empty

    assert asyncio.run(read()) == (["7@d.example"], False)


def test_old_answers_and_too_many_are_forgotten(
    store: MakeStore, front: Front, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_store, "MAX_REPLIES", 10)
    hop = store(full=FULL)
    client = connect(front(hop).port)
    for number in range(30):
        text, parameters = TEXT + f"{number}\r\n", f" SIZE={number}"
        assert send(client, f"good{number}", "full", text=text, parameters=parameters).startswith(MIXED)
        assert rows(tmp_path / "state") <= 11
    with sqlite3.connect(tmp_path / "state/answers.sqlite3") as connection:
        connection.execute("UPDATE answers SET time = time - ?", [reply_store.KEEP_SECONDS])
    del hop.answers["full"]
    assert send(client, "full", text=TEXT + "29\r\n", parameters=" SIZE=29").startswith(b"250 ")
    hop.answers["full"] = FULL
    assert send(client, "good", "full").startswith(MIXED)
    assert rows(tmp_path / "state") == 2


def test_an_lmtp_client_needs_no_memory(store: MakeStore, front: Front, connect: Connect, tmp_path: Path) -> None:
    front(store(), lmtp=True)
    assert not (tmp_path / "state").exists()
