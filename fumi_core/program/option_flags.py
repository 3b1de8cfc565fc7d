"""The flags of ``fumi-core`` that set options of ``Fumi``: name and help come from the option's declaration."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fumi_core.runtime.flag_types import SECONDS
from fumi_core.smtp.option_values import Choice
from fumi_core.smtp.options import DECLARATIONS

F = TypeVar("F", bound=Callable[..., Any])

_DECLARATIONS = {each.flag: each for each in DECLARATIONS.values() if each.flag is not None}
OPTIONS = {flag.lstrip("-").replace("-", "_"): each.name for flag, each in _DECLARATIONS.items()}
"""The option that each flag sets. The keys are the names that click gives to the flags."""
_FLAGS = {each.name: flag for flag, each in _DECLARATIONS.items()}


def option_flag(flag: str, **attributes: Any) -> Callable[[F], F]:
    """A decorator like ``click.option``, for the flag of an option. ``attributes`` override what follows from the declaration."""
    declared = _DECLARATIONS[flag]
    own: dict[str, Any] = {"help": f"{declared.meaning} Repeatable." if attributes.get("multiple") else declared.meaning}
    if isinstance(declared.default, bool):
        own |= {"is_flag": True}
    elif isinstance(declared.default, float):
        own |= {"type": SECONDS, "default": f"{declared.default:g}"}
    elif isinstance(declared.check, Choice):
        own |= {"type": click.Choice(declared.check.values), "default": declared.default}
    return click.option(flag, **{**own, **attributes})


def error_text(error: ValueError) -> str:
    """The text of an option's error, which begins with the option's name, with its flag in place of that name."""
    return re.sub(r"^\w+", lambda name: _FLAGS.get(name[0], name[0]), str(error))
