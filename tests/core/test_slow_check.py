"""Checks that take longer than anyone can wait."""

from __future__ import annotations

import threading
import time

import pytest

from fumi_core.runtime import slow_check
from fumi_core.runtime.slow_check import SlowCheck
from tests.support.waiting import until


def test_however_many_ask_there_is_one_thread() -> None:
    go, asked = threading.Event(), []

    def hang() -> str | None:
        asked.append(1)
        go.wait()
        return "none is up" if len(asked) == 1 else None

    check = SlowCheck(hang)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            check.run().problem(time.monotonic() + 0.02)
    first = check.run()
    assert len(asked) == 1
    go.set()
    until(lambda: not first.is_running, "the answer")
    assert first.problem(time.monotonic()) == "none is up"
    assert check.run().problem(time.monotonic() + 60) is None


def test_a_check_for_which_there_is_no_thread_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*given: object) -> threading.Thread:
        raise OSError("can't start new thread")

    monkeypatch.setattr(slow_check, "start_thread", no_thread)
    assert SlowCheck(lambda: None).run().problem(time.monotonic()) == "can't start new thread"
