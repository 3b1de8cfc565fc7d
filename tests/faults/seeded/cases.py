"""The fault of a number: what fails, in which call or state, and what the clients do meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from .clients import STOPS, Letter, Way, compose
from .next_hop import CONNECTING, STATES
from .plan import Fault

ON_DISK = ("open", "write", "fsync", "link", "directory fsync")
"""The calls that each message takes, at least once, and without which it is not safe."""
CALLS = (*ON_DISK, "unlink")
"""And the one with which its name in tmp/ goes."""
ERRORS = (errno.EIO, errno.EIO, errno.ENOSPC, errno.ENOSPC, errno.EDQUOT)
SMALL, LARGE = 1_500, 200_000
"""Octets of a letter. A large one is written in several pieces."""
PERCENT_LARGE = 10


@dataclass(frozen=True)
class Setting:
    """fumi-core with this target. ``lmtp``: its clients speak LMTP."""

    name: str
    percent: int
    """Its share of the campaign."""
    target: str
    lmtp: bool = False
    workers: int = 1

    @property
    def on_disk(self) -> bool:
        return self.target == "maildir"


SETTINGS = (
    Setting("maildir", 25, "maildir"),
    Setting("maildir-workers", 20, "maildir", workers=2),
    Setting("maildir-lmtp", 10, "maildir", lmtp=True),
    Setting("smtp", 12, "smtp"),
    Setting("smtp-workers", 8, "smtp", workers=2),
    Setting("lmtp", 15, "lmtp"),
    Setting("lmtp-lmtp", 10, "lmtp", lmtp=True),
)


@dataclass(frozen=True)
class Case:
    """One fault. ``letters`` are sent at the same time, each with the way of its first attempt; later ones are plain."""

    letters: tuple[tuple[Letter, Way], ...]
    fault: Fault | None = None
    """In a system call."""
    death: str = ""
    """The state in which the next hop dies; "hang up", "defer" and "silence" are what it may do alive.

    When it falls silent between two of LMTP's replies, and the first are recorded, the core is killed.
    """
    after: int = 0
    kill: float | None = None
    """Seconds after which the core is killed, or one of its workers, whatever it does."""
    terminate: bool = False
    """SIGTERM while a call is held."""

    def __str__(self) -> str:
        letters = ", ".join(f"{len(letter.text)} octets for {len(letter.recipients)} {way}" for letter, way in self.letters)
        return f"{self.fault or self.death or self.kill} after {self.after}, terminate {self.terminate}; letters: {letters}"


def make(setting: Setting, number: int, seed: str) -> Case:
    """The same for the same seed and number."""
    chance = Random(f"{seed}:{setting.name}:{number}")
    kinds = (_error, _error, _kill_in_a_call, _kill_in_a_call, _held, _client) if setting.on_disk else (_death, _death, _death)
    if setting.target == "lmtp" and not setting.lmtp:
        kinds = (*kinds, _kill_between_answers)
    kind: Callable[[Random, Setting, str], Case] = chance.choice((*kinds, _kill_at_a_reply, _kill_somewhere, _client))
    return kind(chance, setting, f"{setting.name}-{number}")


def _letters(chance: Random, setting: Setting, mark: str, stops: float = 0.15) -> tuple[tuple[Letter, Way], ...]:
    """One or a few; ``stops`` is how likely a client is to stop in the middle of its first attempt."""
    letters = []
    for each in range(chance.choice((1, 1, 1, 2, 2, 3))):
        size = LARGE if chance.randrange(100) < PERCENT_LARGE else chance.randrange(SMALL)
        recipients = tuple(f"r{number}@{mark}.example" for number in range(chance.choice((1, 1, 2, 3))))
        stop = chance.choice(STOPS) if chance.random() < stops else ""
        binary = not setting.on_disk and chance.random() < 0.15
        chunks = binary or chance.random() < 0.35
        way = Way(setting.lmtp, chunks, binary, chance.random() < 0.5, stop, chance.randrange(100))
        letters.append((compose(chance, f"{mark}-{each}", recipients, size, binary), way))
    return tuple(letters)


def _error(chance: Random, setting: Setting, mark: str) -> Case:
    letters = _letters(chance, setting, mark, stops=0.05)
    call = chance.choice(CALLS)
    if call == "write" and chance.random() < 0.3:
        return Case(letters, Fault(call, "shorten", chance.randrange(len(letters)), chance.randrange(1, 4)))
    times = chance.choice((1, 1, 1, 2, 5))
    return Case(letters, Fault(call, "fail", chance.randrange(len(letters)), times, chance.choice(ERRORS)))


def _kill_in_a_call(chance: Random, setting: Setting, mark: str) -> Case:
    letters = _letters(chance, setting, mark)
    return Case(
        letters, Fault(chance.choice(CALLS), chance.choice(("kill before", "kill after")), chance.randrange(len(letters)))
    )


def _kill_at_a_reply(chance: Random, setting: Setting, mark: str) -> Case:
    """There are five at least: the banner, EHLO's, MAIL's and RCPT's, DATA's, the message's."""
    letters = _letters(chance, setting, mark)
    return Case(letters, Fault("send", chance.choice(("kill before", "kill after")), chance.randrange(5 * len(letters))))


def _kill_somewhere(chance: Random, setting: Setting, mark: str) -> Case:
    return Case(_letters(chance, setting, mark), kill=chance.random() * 0.02)


def _kill_between_answers(chance: Random, setting: Setting, mark: str) -> Case:
    letter, way = _letters(chance, setting, mark, stops=0)[0]
    recipients = tuple(f"r{number}@{mark}.example" for number in range(chance.choice((2, 3, 5))))
    return Case(((replace(letter, recipients=recipients), way),), death="silence", after=chance.randrange(len(recipients) - 1))


def _held(chance: Random, setting: Setting, mark: str) -> Case:
    """A call takes long, and the client goes away meanwhile; once in a while the server is told to stop."""
    terminate = chance.random() < 0.1 and setting.workers == 1
    letter, way = _letters(chance, setting, mark, stops=0)[0]
    stop = "" if terminate else chance.choice(STOPS[2:])
    return Case(((letter, replace(way, stop=stop)),), Fault(chance.choice(CALLS), "hold"), terminate=terminate)


def _client(chance: Random, setting: Setting, mark: str) -> Case:
    """Nothing fails but the clients."""
    return Case(_letters(chance, setting, mark, stops=1))


def _death(chance: Random, setting: Setting, mark: str) -> Case:
    letters = _letters(chance, setting, mark, stops=0.1)
    states = [state for state in STATES if state != "replies" or setting.target == "lmtp"]
    state = chance.choice([*states, "hang up", *(["defer", "defer", "replies"] if setting.target == "lmtp" else [])])
    if state in CONNECTING:
        times = 1  # for as many letters as there are, one connection may do
    else:
        times = sum(len(letter.recipients) for letter, _ in letters) if state == "replies" else len(letters)
    return Case(letters, death=state, after=chance.randrange(times))
