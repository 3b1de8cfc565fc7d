"""The negotiation between server and filter: which stages are sent, which are answered, and which changes are allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from fumi_core.plugins.milter import wire
from fumi_core.plugins.milter.wire import Answer, Malformed, ReplyCode, Verdict

VERSION = 6
OLDEST_VERSION = 2


class Stage(Enum):
    """A step of a session: its letter, and the flags by which a filter declines it, or declines to answer it.

    ``macro_list`` is the number of the list of macros that a filter may request for it. DATA exists since version 4.
    """

    CONNECT = (b"C", 0x1, 0x1000, 0)
    HELO = (b"H", 0x2, 0x2000, 1)
    MAIL = (b"M", 0x4, 0x4000, 2)
    RCPT = (b"R", 0x8, 0x8000, 3)
    DATA = (b"T", 0x200, 0x10000, 4)
    HEADER = (b"L", 0x20, 0x80, None)
    END_OF_HEADER = (b"N", 0x40, 0x40000, 6)
    BODY = (b"B", 0x10, 0x80000, None)
    END_OF_MESSAGE = (b"E", 0, 0, 5)

    def __init__(self, letter: bytes, unwanted: int, unanswered: int, macro_list: int | None) -> None:
        self.letter = letter
        self.unwanted = unwanted
        self.unanswered = unanswered
        self.macro_list = macro_list


_NO_UNKNOWN_COMMANDS = 0x100
_SKIP = 0x400
_LEADING_SPACE = 0x100000
_STEPS = _NO_UNKNOWN_COMMANDS | _SKIP | _LEADING_SPACE | sum(each.unwanted | each.unanswered for each in Stage)

_ACTIONS: dict[type, int] = {
    wire.AddHeader: 0x1,
    wire.InsertHeader: 0x1,
    wire.ReplaceBody: 0x2,
    wire.AddRecipient: 0x4 | 0x80,
    wire.DeleteRecipient: 0x8,
    wire.ChangeHeader: 0x10,
    wire.Quarantine: 0x20,
    wire.ChangeSender: 0x40,
}
_CHOOSES_MACROS = 0x100
_ALL_ACTIONS = 0x1FF

_AT_CONNECT = (Stage.CONNECT, Stage.HELO)
_SKIPPABLE = (Stage.RCPT, Stage.HEADER, Stage.BODY)


def offer() -> bytes:
    """The first packet on each connection."""
    return wire.negotiation(VERSION, _ALL_ACTIONS, _STEPS)


@dataclass(frozen=True)
class Agreement:
    """The result. ``macros`` has the names of macros that the filter has requested, for the stages for which it has."""

    version: int
    actions: int
    steps: int
    macros: Mapping[Stage, list[str]]

    @property
    def leading_space(self) -> bool:
        """Whether header values are sent and received with the space after the colon."""
        return bool(self.steps & _LEADING_SPACE)

    @property
    def reusable(self) -> bool:
        """Whether the connection can serve another client."""
        return self.version >= 6

    def wants(self, stage: Stage) -> bool:
        return not self.steps & stage.unwanted and (stage is not Stage.DATA or self.version >= 4)

    def answers(self, stage: Stage) -> bool:
        return not self.steps & stage.unanswered

    def check(self, stage: Stage, answer: Answer) -> None:
        """Raises Malformed for an answer that is not allowed at this stage."""
        if not isinstance(answer, Verdict | ReplyCode):
            if stage is not Stage.END_OF_MESSAGE:
                raise Malformed(f"{type(answer).__name__} at stage {stage.name}")
            if not self.actions & _ACTIONS[type(answer)]:
                raise Malformed(f"{type(answer).__name__} without having negotiated it")
        if answer is Verdict.DISCARD and stage in _AT_CONNECT:
            raise Malformed(f"DISCARD at stage {stage.name}")
        if answer is Verdict.SKIP and not (self.steps & _SKIP and stage in _SKIPPABLE):
            raise Malformed(f"SKIP at stage {stage.name}")


def read_agreement(letter: bytes, data: bytes) -> Agreement:
    """The filter's answer to ``offer()``. Raises Malformed."""
    if letter != b"O":
        raise Malformed(f"an answer {letter!r} to the negotiation")
    version, actions, steps, rest = wire.parse_numbers(data)
    if not OLDEST_VERSION <= version <= VERSION:
        raise Malformed(f"protocol version {version}")
    if actions & ~_ALL_ACTIONS:
        raise Malformed(f"a request for unknown actions, {actions:#x}")
    stages = {stage.macro_list: stage for stage in Stage}
    lists = {stages[number]: names for number, names in wire.parse_macro_lists(rest) if number in stages}
    return Agreement(version, actions, steps & _STEPS, lists if actions & _CHOOSES_MACROS else {})
