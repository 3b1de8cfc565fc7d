"""What became of a load's messages: lost, doubled, refused, and how long clients waited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

LIMIT = 35.0
"""Seconds until some client gets its 250 again, and that any client may wait for a reply or the end of its connection.

On Linux before 6.15 some clients wait for up to 45, see fumi_core/runtime/dead_peers.py.
"""


@dataclass
class Attempt:
    """One attempt to send one message. Times are in seconds since 1970."""

    id: str
    began: float
    ended: float = 0.0
    step: str = "connect"
    """What it was waiting for at the end: for the reply to a command, say."""
    accepted: bool = False
    """Whether the message got its 250."""
    reply: str = ""
    """The reply that refused it."""
    error: str = ""
    longest: float = 0.0
    """The longest wait for anything, in seconds."""

    @property
    def unsure(self) -> bool:
        """Whether the message was sent, and the client has no reply, or a reply that asks for a retry."""
        return self.step == "message" and not self.accepted


@dataclass
class Verdict:
    """Of one fault: numbers of messages, and seconds."""

    messages: int
    lost: int
    """Accepted and not stored."""
    doubled: int
    unexplained: int
    """Copies beyond those of attempts for which the client got no 250."""
    refused: int
    """Attempts that got a 4xx or 5xx reply."""
    broken: int
    """Attempts whose connection ended, or could not be made."""
    longest: float
    """The longest wait of a client for a reply or the end of its connection."""
    silence: float
    """The longest time in which no client got a 250."""

    ROW = "{:34} {:>8} {:>4} {:>7} {:>11} {:>7} {:>6} {:>12} {:>14}"
    HEAD = ROW.format("fault", "messages", "lost", "doubled", "unexplained", "refused", "broken", "longest wait", "without a 250")

    def row(self, name: str) -> str:
        numbers = self.messages, self.lost, self.doubled, self.unexplained, self.refused, self.broken
        return self.ROW.format(name, *numbers, f"{self.longest:.1f} s", f"{self.silence:.1f} s")

    def problems(self, answered: bool = True) -> list[str]:
        """Violations; ``answered``: messages can be accepted in spite of the fault."""
        found = [f"{self.lost} lost"] * bool(self.lost) + [f"{self.unexplained} doubled after a 250"] * bool(self.unexplained)
        found += [f"a client waited {self.longest:.1f} s"] * (self.longest > LIMIT)
        return found + [f"no message accepted for {self.silence:.1f} s"] * (answered and self.silence > LIMIT)


def judge(attempts: Sequence[Attempt], stored: Mapping[str, int]) -> Verdict:
    """The verdict on a load whose messages are stored so many times, by their id."""
    accepted = Counter(each.id for each in attempts if each.accepted)
    unsure = Counter(each.id for each in attempts if each.unsure)
    ids = {each.id for each in attempts}
    times = sorted(each.ended for each in attempts if each.accepted)
    return Verdict(
        messages=len(ids),
        lost=sum(not stored.get(each) for each in accepted),
        doubled=sum(stored.get(each, 0) > 1 for each in ids),
        unexplained=sum(max(0, stored.get(each, 0) - accepted[each] - unsure[each]) for each in ids),
        refused=sum(bool(each.reply) for each in attempts),
        broken=sum(bool(each.error) for each in attempts),
        longest=max(each.longest for each in attempts),
        silence=max((later - earlier for earlier, later in pairwise(times)), default=0.0),
    )
