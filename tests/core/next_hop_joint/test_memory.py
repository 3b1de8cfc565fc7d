"""What the memory of answers keeps and forgets, and what happens where nothing can be remembered."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fumi_core.delivery.next_hop import reply_store
from tests.core.client import Connect
from tests.core.next_hop_joint.delivery import FULL, MIXED, OTHER, TEXT, Front, MakeStore, rows, send


def test_no_room_for_a_message_that_must_be_kept_is_452(
    store: MakeStore, front: Front, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
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

    def full(*arguments: Any) -> Any:
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
