"""``--config FILE.toml``: flags from a TOML file, shared by both programs."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fumi_core.runtime.files import read_file
from fumi_core.runtime.settings import ACTIONS, nearest

F = TypeVar("F", bound=Callable[..., Any])
_TOO_LARGE_FOR_TOML = 1 << 63
"""The first integer too large for TOML."""
_MAX_SHOWN_CHARACTERS = 100
"""Characters of a value that are shown in an error."""


def config_option(section: str) -> Callable[[F], F]:
    """``--config FILE.toml``: keys are the flags without their leading dashes, at top level or under ``[section]``."""

    def load(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value:
            ctx.default_map = {**(ctx.default_map or {}), **_read(ctx, value, section)}

    return click.option(
        "--config",
        metavar="FILE.toml",
        type=click.Path(exists=True, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=load,
        help="Reads settings from this file.",
    )


def _read(ctx: click.Context, path: str, section: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(read_file(path).decode())
    except OSError as error:
        raise click.BadParameter(f"{path}: cannot read the file: {error.strerror}") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number with more digits than Python reads
        raise click.BadParameter(f"{path}: {error}") from None
    except RecursionError:
        raise click.BadParameter(f"{path}: nested too deeply") from None
    tables = {name: value for name, value in document.items() if isinstance(value, dict)}
    if stray := set(tables) - {"core", "edge"}:
        raise click.BadParameter(f"{path}: unknown section [{sorted(stray)[0]}]; there are [core] and [edge]")
    known = {option[2:]: param for param in ctx.command.get_params(ctx) for option in param.opts if option.startswith("--")}
    settings: dict[str, Any] = {}
    common = {key: value for key, value in document.items() if key not in tables}
    for flag, (key, value) in {**_flags(path, common), **_flags(path, tables.get(section, {}))}.items():
        param = known.get(flag)
        if param is None or not param.name:
            keys = sorted(each for each in known if f"--{each}" not in {*ACTIONS, "--config"})
            hint = nearest(flag, keys) or "keys are the flags without the leading dashes"
            raise click.BadParameter(f"{path}: unknown key {key!r}: {hint}")
        if f"--{flag}" in {*ACTIONS, "--config"}:
            raise click.BadParameter(f"{path}: {key} is not a setting; give --{flag} on the command line")
        try:
            settings[param.name] = _value(ctx, param, value)
        except click.BadParameter as error:
            raise click.BadParameter(f"{path}: {key} = {_shown(value)}: {error.message}") from None
    return settings


def _flags(path: str, table: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """The flags that a table sets, each with its key as it is written there, and its value."""
    flags: dict[str, tuple[str, Any]] = {}
    for key, value in table.items():
        flag = key.replace("_", "-")
        if flag in flags:
            raise click.BadParameter(f"{path}: {flags[flag][0]} and {key} are the same setting; remove one")
        flags[flag] = key, value
    return flags


def _value(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Convert a key's value for its flag; a repeatable flag takes a list or a single value. Raises BadParameter."""
    many = getattr(param, "multiple", False)
    values = value if isinstance(value, list) and many else [value]
    for each in values:
        _check_type(param, each, many)
        # Otherwise the error would name the flag, and not the file.
        param.type.convert(each, None, ctx)
    return values if many else value


def _check_type(param: click.Parameter, value: Any, many: bool) -> None:
    """A value must have its TOML type, or be a string that the flag accepts; true and false are not numbers, unlike in Python."""
    if isinstance(value, str) and "\0" in value:
        # Flags and variables cannot contain NUL, and no system call accepts it.
        raise click.BadParameter("must not contain NUL")
    if getattr(param, "is_flag", False):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(param.type, click.IntRange):
        good = isinstance(value, int | str) and not isinstance(value, bool)
        wanted = getattr(param.type, "wanted", "a whole number")
    elif isinstance(param.type, click.FloatRange):
        good = isinstance(value, int | float | str) and not isinstance(value, bool)
        wanted = getattr(param.type, "wanted", "a number")
    elif isinstance(param.type, click.Choice):
        # For example min-tls = 1.3.
        good, wanted = isinstance(value, str) or str(value) in param.type.choices, "a string, in quotes"
    else:
        good, wanted = isinstance(value, str), "a string, in quotes, or a list of strings" if many else "a string, in quotes"
    if not good or (isinstance(value, int) and abs(value) >= _TOO_LARGE_FOR_TOML):
        raise click.BadParameter(f"write {wanted}")


def _shown(value: Any) -> str:
    """A value as it stands in the file, shortened."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:
        return "…"  # a number with thousands of digits, written in hexadecimal
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}…"
