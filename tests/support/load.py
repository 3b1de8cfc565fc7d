"""A steady load of messages through a mail system, and the verdict on what became of them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.support import starter
from tests.support.hosts import Host
from tests.support.starter import ROOT
from tests.support.verdict import Attempt, Verdict, judge
from tests.support.waiting import until


class Load:
    """A client's messages to port 25, ``rate`` a second, each sent again until it has its 250 (tests/support/load_client.py)."""

    def __init__(self, client: Host, target: str, rate: float, certificate: Path, directory: Path, name: str = "load") -> None:
        self._output, self._log = directory / f"{name}.jsonl", directory / f"{name}.log"
        words = client.command(
            sys.executable, "-m", "tests.support.load_client", target, "25", str(rate), certificate, f"{name}x"
        )
        reader, self._stdin = os.pipe()
        with os.fdopen(reader, "rb") as stdin, self._output.open("wb") as output, self._log.open("wb") as log:
            self.process = starter.start(*words, stdin=stdin, stdout=output, stderr=log, cwd=ROOT)

    def attempts(self) -> list[Attempt]:
        lines = self._output.read_text().split("\n")[:-1]
        return [Attempt(**json.loads(line)) for line in lines]

    def _accepted(self) -> int:
        return sum(each.accepted for each in self.attempts())

    def await_accepted(self, count: int) -> None:
        """Wait until so many messages more have been accepted."""
        enough = self._accepted() + count
        until(lambda: self._accepted() >= enough, f"{count} messages accepted", 120)

    def run_for(self, seconds: float) -> None:
        """Let it go on for a time."""
        end = time.monotonic() + seconds
        until(lambda: time.monotonic() > end, patience=2 * seconds)

    def finish(self, stored: Callable[[], Iterable[str]]) -> Verdict:
        """Begin no more messages, wait until all are accepted, and judge by the texts that ``stored`` returns then."""
        os.close(self._stdin)
        assert self.process.wait(180) == 0, self._log.read_text()
        ids = (re.search(r"^X-Load: (\w+)", text, re.MULTILINE) for text in stored())
        return judge(self.attempts(), Counter(found[1] for found in ids if found))
