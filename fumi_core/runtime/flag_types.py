"""The types of flags. A value that does not fit is an error of one line that says what to write."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import click
from click.shell_completion import CompletionItem

from fumi_core.runtime.addresses import Networks, SocketAddress, parse_address

_MODE = re.compile(r"0?[0-7]{3}")


def _refuse_comma(param_type: click.ParamType, text: str, what: str, *where: Any) -> None:  # type: ignore[type-arg]
    """Refuse several values separated by commas, which other programs accept as a list."""
    if "," in text:
        param_type.fail(f"{text!r} contains a comma: repeat the flag, or separate {what} by spaces in a variable", *where)


class AddressType(click.ParamType):  # type: ignore[type-arg]
    """ADDR: HOST:PORT, [V6]:PORT, :PORT, unix:/path or fd:N."""

    name = "addr"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SocketAddress:
        if isinstance(value, SocketAddress):
            return value
        if not str(value).startswith(("unix:", "fd:")):
            _refuse_comma(self, str(value), "addresses", param, ctx)
        try:
            return self.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def parse(self, text: str) -> SocketAddress:
        """Raises ValueError."""
        return parse_address(text)


class NameType(click.ParamType):  # type: ignore[type-arg]
    """A non-empty name, of a file or a user."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("must not be empty", param, ctx)
        return str(value)


class FileType(NameType):
    """A non-empty name of a file or directory, which a shell completes. It is opened later, by what reports errors of its own."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class NetworkType(click.ParamType):  # type: ignore[type-arg]
    """A CIDR block, an address, or ``unix``. The value stays a string, because the strings are used as one set."""

    name = "cidr|unix"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "CIDR|unix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = "unix" if str(value).lower() == "unix" else str(value)
        _refuse_comma(self, text, "networks", param, ctx)
        try:
            Networks([text])
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return text


class SecondsType(click.FloatRange):
    """A finite number of seconds."""

    name = "seconds"
    wanted = "a number of seconds, such as 5"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except (ValueError, OverflowError):
            seconds = math.nan
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a number of seconds: write one such as 5", param, ctx)
        return float(super().convert(seconds, param, ctx))


class ModeType(click.ParamType):  # type: ignore[type-arg]
    """Permissions as chmod(1) takes them, in octal."""

    name = "octal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if not _MODE.fullmatch(str(value)):
            self.fail(f"{value!r} is not a mode: write one in octal, such as 0660", param, ctx)
        return int(value, 8)


class CountType(click.IntRange):
    """A whole number; errors name what it counts and show an example."""

    name = "n"

    def __init__(self, what: str, example: int, *, min: int, max: int | None = None) -> None:
        super().__init__(min, max)
        self.what = what
        self.wanted = f"{what}, such as {example}"
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            count = int(value)
        except ValueError:
            self.fail(f"{value!r} is not {self.what}: write one such as {self._example}", param, ctx)
        return int(super().convert(count, param, ctx))


class WorkersType(CountType):
    """A number of processes; ``auto`` is the number of processors that this process may use."""

    name = "n|auto"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value).lower() == "auto":
            return len(os.sched_getaffinity(0))
        return super().convert(value, param, ctx)


ADDRESS = AddressType()
NAME = NameType()
FILE = FileType()
NETWORK = NetworkType()
SECONDS = SecondsType(min=0.001)
SECONDS_OR_ZERO = SecondsType(min=0)
MODE = ModeType()
COUNT = CountType("a whole number", 100, min=1)
BYTES = CountType("a number of bytes", 25_000_000, min=1)
WORKERS = WorkersType('a number of processes or "auto"', 4, min=1, max=1024)
