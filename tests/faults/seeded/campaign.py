"""Runs the faults of a setting one after another, and checks after each what must hold whatever happens."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.waiting import PATIENCE, until

from .cases import Case, Setting, make
from .clients import Letter, Verdict, Way, attempt
from .next_hop import STATES, NextHop
from .program import Core

SEED = os.environ.get("FAULT_SEED", "5321")
ONLY = os.environ.get("FAULT_ONLY", "")
POOL = 16
"""Idle connections to the next hop that a process may keep."""
DRAIN = 0.2
"""Seconds until a server that was told to stop breaks off."""
SESSION = " helo=me "
"""In the line that tells of the end of a client's session."""
TRACE = re.compile(rb"(?:Return-Path: .*\n(?:Delivered-To: .*\n)+)?Received: .*\n(?:\t.*\n)*")
"""What stands before the text, with either line end."""


class Copy(NamedTuple):
    """A message that is there, for one recipient."""

    mark: str
    recipient: str
    text: bytes
    answered: bool


class Attempts:
    """What a letter's attempts came to: for each recipient, how many had which verdict."""

    def __init__(self, letter: Letter) -> None:
        self.letter = letter
        self.verdicts: Counter[tuple[str, Verdict]] = Counter()
        self.sessions = 0
        """How many the server must log."""
        self.failed = 0
        """Attempts of clients that were greeted and went on to the end, and were answered 250 for nobody."""


def run(setting: Setting, count: int, directory: Path) -> None:
    """Inject this setting's share of ``count`` faults, each of which must strike. Fails at the first that breaks a claim."""
    numbers = _numbers(setting, count * setting.percent // 100)
    if not numbers:
        return
    bench = Bench(setting, directory)
    try:
        for number in numbers:
            case = make(setting, number, SEED)
            try:
                bench.inject(case)
            except Exception as error:
                pytest.fail(
                    f"{type(error).__name__}: {error}\nthe fault: {case}\n"
                    f"again with: FAULT_SEED={SEED} FAULT_ONLY={setting.name}:{number}\n"
                    f"the log since the fault before:\n{(bench.log + bench.core.new_log())[-5000:]}",
                    pytrace=not isinstance(error, AssertionError),
                )
        bench.finish()
    finally:
        bench.close()


def _numbers(setting: Setting, count: int) -> range:
    if not ONLY:
        return range(count)
    name, _, number = ONLY.partition(":")
    return range(int(number), int(number) + 1) if name == setting.name else range(0)


class Bench:
    """A program, its next hop or its Maildir, and what is known of both."""

    def __init__(self, setting: Setting, directory: Path) -> None:
        self.setting = setting
        self.hop = None if setting.on_disk else NextHop(setting.target == "lmtp")
        self.maildir = directory / "maildir"
        self.state = directory / "state" / "answers.sqlite3"
        where = "maildir" if self.hop is None else f"127.0.0.1:{self.hop.port}"
        flags = ["--deliver", f"{setting.target}:{where}", "--drain-timeout", str(DRAIN)]
        flags += ["--lmtp"] * setting.lmtp + ["--workers", str(setting.workers)] * (setting.workers > 1)
        self.core = Core(directory, flags)
        self.log = ""
        """What the program logged of the last fault."""
        self._idle = 0
        """Descriptors of a process that has nothing to do."""
        self._warm_up()

    def _warm_up(self) -> None:
        self.core.ensure()
        letter = Letter("first", b"Subject: first\r\n\r\n", ("r@first.example",))
        for _ in range(3 * self.setting.workers):
            outcome = attempt(self.core.port, letter, letter.recipients, Way(self.setting.lmtp))
            assert outcome.verdicts == {"r@first.example": Verdict.TAKEN}
        if self.hop is not None:
            self.hop.hang_up()
        until(lambda: len(self.core.descriptors()) == self.setting.workers, "all workers serving")
        time.sleep(0.2)  # there is nothing to poll: this is what will be compared with
        self._idle = max(self.core.descriptors())
        self._copies()

    def close(self) -> None:
        self.core.close()
        if self.hop is not None:
            self.hop.close()

    # One fault

    def inject(self, case: Case) -> None:
        """Raises AssertionError where a claim does not hold."""
        self.core.ensure()
        self.log = self.core.new_log()
        tried = [Attempts(letter) for letter, _ in case.letters]
        errors: list[Exception] = []

        def send(attempts: Attempts, way: Way) -> None:
            try:
                self._send(attempts, way, held if way.stop and holds else bool)
            except Exception as error:
                errors.append(error)

        holds = case.fault is not None and case.fault.action == "hold"

        def held() -> None:
            until(lambda: self.core.plan.struck, "a call being held")

        struck = self._begin(case)
        threads = [
            threading.Thread(target=send, args=(attempts, way)) for attempts, (_, way) in zip(tried, case.letters, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._meanwhile(case)
        for thread in threads:
            thread.join()
        struck += self._end(case)
        for error in errors:
            raise error
        struck += sum(bool(way.stop) for _, way in case.letters)
        self._check(case, tried, struck)

    def _begin(self, case: Case) -> int:
        if case.fault is not None:
            self.core.plan.arm(case.fault)
        if self.hop is not None:
            self.hop.died = 0
            if case.death == "hang up":
                self.hop.hang_up()
                return 1
            if case.death == "defer":
                self.hop.condemn("", defer="r1@")
            elif case.death:
                self.hop.condemn(case.death, case.after)
        return 0

    def _meanwhile(self, case: Case) -> None:
        if case.kill is not None:
            time.sleep(case.kill)  # any moment is as good as another
            self.core.kill()
        if case.death == "silence" and self.hop is not None:
            hop = self.hop
            until(lambda: hop.paused, "silence between two replies")
            until(self._recorded, "a record of the replies before")
            self.core.kill()
        if case.fault is not None and case.fault.action == "hold":
            until(lambda: self.core.plan.struck, "a call being held")
            if case.terminate:
                self.core.terminate()
            # Time to notice that the client has gone, or to break off. When the client is told is for the server to decide.
            time.sleep(2 * DRAIN if case.terminate else 0.02)
            self.core.plan.disarm()

    def _recorded(self) -> bool:
        """Whether the program remembers who has the message, so that it survives its death."""
        assert self.hop is not None
        with contextlib.closing(sqlite3.connect(self.state)) as database:
            found = database.execute("SELECT recipient FROM answers WHERE code = 250").fetchall()
        return {(each,) for each in self.hop.paused} <= set(found)

    def _end(self, case: Case) -> int:
        struck = self.core.plan.disarm() if case.fault is not None else 0
        if self.hop is not None:
            if case.death in STATES:
                until(lambda: self.hop and self.hop.died, "the death of the next hop")
            struck += self.hop.died
            self.hop.pardon()
        return struck + (case.kill is not None) + (case.death in ("defer", "silence"))

    def _send(self, attempts: Attempts, way: Way, moment: Callable[[], object]) -> None:
        """Send it until each recipient has it."""
        letter, left = attempts.letter, attempts.letter.recipients
        deadline = time.monotonic() + PATIENCE
        while left:
            assert time.monotonic() < deadline, f"{letter.mark} was not taken for {left}: {dict(attempts.verdicts)}"
            self.core.ensure()
            verdicts, greeted = attempt(self.core.port, letter, left, way, moment)
            attempts.sessions += greeted
            attempts.verdicts.update(verdicts.items())
            left = tuple(recipient for recipient in left if verdicts[recipient] is not Verdict.TAKEN)
            attempts.failed += greeted and Verdict.TAKEN not in verdicts.values() and not way.stop
            way = replace(way, stop="")
            if left and self.hop is not None:
                self.hop.revive()

    # What must hold

    def _check(self, case: Case, tried: list[Attempts], struck: int) -> None:
        assert struck, "the fault did not strike"
        self.core.ensure()
        killed = (
            case.kill is not None
            or case.terminate
            or case.death == "silence"
            or (case.fault is not None and case.fault.action.startswith("kill"))
        )
        self._sessions_end(0 if killed else sum(attempts.sessions for attempts in tried))
        self._nothing_left(killed or (case.fault is not None and case.fault.call == "unlink"))
        self.log += self.core.new_log()
        assert "Traceback" not in self.log, "a traceback"
        letters = {attempts.letter.mark: attempts for attempts in tried}
        copies: Counter[tuple[str, str, bool]] = Counter()
        for copy in self._copies():
            assert copy.mark in letters, f"{copy.mark} came late"
            assert copy.text == letters[copy.mark].letter.text, f"{copy.mark} is damaged: {copy.text[:2000]!r}"
            copies[copy.mark, copy.recipient, copy.answered] += 1
        for attempts in tried:
            self._check_letter(attempts, copies)
        if self.hop is not None:
            hop = self.hop
            until(lambda: not hop.busy, "the end of the transactions at the next hop")
        if case.death == "hang up" and not any(way.stop for _, way in case.letters):
            self._check_failures(tried, 0)
        if case.fault is not None and case.fault.action in ("fail", "shorten"):
            self._check_failures(tried, struck if case.fault.action == "fail" and case.fault.call != "unlink" else 0)

    def _check_failures(self, tried: list[Attempts], errors: int) -> None:
        """An error is one message's alone, and that message is not answered 250."""
        failed = sum(attempts.failed for attempts in tried)
        story = f"{errors} errors: {[dict(each.verdicts) for each in tried]}"
        assert failed <= errors, f"too many attempts failed: {story}"
        stopped = sum(count for each in tried for (_, verdict), count in each.verdicts.items() if verdict is not Verdict.TAKEN)
        assert stopped or not errors, f"an error was answered 250: {story}"

    def _check_letter(self, attempts: Attempts, copies: Counter[tuple[str, str, bool]]) -> None:
        for recipient in attempts.letter.recipients:
            which = attempts.letter.mark, recipient
            known, silent = copies[(*which, True)], copies[(*which, False)]
            unknown = attempts.verdicts[recipient, Verdict.UNKNOWN]
            story = f"{which}: {known} copies, {silent} without an answer, after {dict(attempts.verdicts)}"
            assert attempts.verdicts[recipient, Verdict.TAKEN] == 1, story
            assert not attempts.verdicts[recipient, Verdict.REJECTED], f"rejected: {story}"
            assert known + silent >= 1, f"lost: {story}"
            # What was answered 4xx, or not sent to its end, is not there; of a next hop that dies nobody can know.
            recorded = self.hop is not None and recipient in self.hop.paused
            assert known <= 1 + (0 if recorded else unknown), f"too many: {story}"

    def _sessions_end(self, count: int) -> None:
        """So many, each of them after what its message still had going on."""

        def ended() -> bool:
            self.log += self.core.new_log()
            return self.log.count(SESSION) >= count

        until(ended, f"the end of {count} sessions")
        if not count:
            time.sleep(0.01)  # who was killed logs nothing that could be waited for

    def _nothing_left(self, excused: bool) -> None:
        """No descriptor, no connection, no file on its way; who was killed, or could not unlink, is ``excused`` from that."""
        processes = self.setting.workers

        def complete() -> bool:
            self.core.ensure()  # a process that has just been killed may still have seemed to run
            return len(self.core.descriptors()) == processes

        until(complete, f"{processes} processes serving")

        def idle() -> bool:
            connections = self.hop.connections if self.hop is not None else 0
            return sum(self.core.descriptors()) <= processes * self._idle + connections and (excused or not self._temporary())

        _within(idle, lambda: f"left: descriptors {self.core.descriptors()}, {self._idle} when idle; {self._temporary()}")
        for path in self._temporary():
            path.unlink()
        if self.hop is not None:
            assert self.hop.connections <= POOL * processes, f"{self.hop.connections} connections to the next hop"

    def _temporary(self) -> list[Path]:
        return list((self.maildir / "tmp").iterdir()) if self.hop is None else []

    def _copies(self) -> list[Copy]:
        """All that has been delivered since the last call."""
        if self.hop is not None:
            return [_copy(each.recipient, each.text, each.answered) for each in self.hop.take()]
        copies = []
        for path in (self.maildir / "new").iterdir():
            data = path.read_bytes()
            path.unlink()
            trace = TRACE.match(data)
            assert trace, f"half a message: {data[:2000]!r}"
            recipients = re.findall(rb"Delivered-To: (.*)\n", trace[0])
            copies += [_copy(recipient.decode(), data.replace(b"\n", b"\r\n"), True) for recipient in recipients]
        return copies

    def finish(self) -> None:
        """A stop is a good one after all that, and nothing comes late."""
        assert self.core.stop() == 0, self.core.new_log()
        assert "Traceback" not in self.core.new_log()
        assert not self._copies()


def _copy(recipient: str, data: bytes, answered: bool) -> Copy:
    trace = TRACE.match(data)
    assert trace, f"no trace line: {data[:2000]!r}"
    text = data[trace.end() :]
    found = re.match(rb"Subject: (.*)\r\n", text)
    assert found, f"no text of ours: {data[:2000]!r}"
    return Copy(found[1].decode(), recipient, text, answered)


def _within(condition: Callable[[], bool], story: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, story()
        time.sleep(0.002)
