"""``--help`` in groups: those of the READMEs' tables, each under a heading that the program's source has above its flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
_MEMO = "__click_params__"
"""The attribute in which click's decorators collect a function's parameters; click has no public name for it."""
_HEADING = "fumi_heading"
"""The attribute of a parameter with its group's heading."""


def heading(text: str) -> Callable[[F], F]:
    """A decorator above the flags of a group. Those below it, as far as the next heading, are shown under this one."""

    def add(function: F) -> F:
        for param in getattr(function, _MEMO, ()):  # decorators run from the bottom up, so groups below have theirs already
            if not hasattr(param, _HEADING):
                setattr(param, _HEADING, text)
        return function

    return add


class GroupedCommand(click.Command):
    """A command whose ``--help`` shows its flags in groups, in the order of its source."""

    def groups(self, ctx: click.Context) -> dict[str, list[click.Option]]:
        """The flags of each heading. ``--help``, which click adds after all others, belongs to the last one."""
        groups: dict[str, list[click.Option]] = {}
        text = "Options"
        for param in self.get_params(ctx):
            if isinstance(param, click.Option):
                text = getattr(param, _HEADING, text)
                groups.setdefault(text, []).append(param)
        return groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for text, options in self.groups(ctx).items():
            with formatter.section(text):
                formatter.write_dl([record for option in options if (record := option.get_help_record(ctx)) is not None])
