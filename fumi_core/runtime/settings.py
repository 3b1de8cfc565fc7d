"""How both programs read their settings: flags, then environment variables, then ``--config FILE.toml``, then defaults.

They can be read again while the program runs, as if it were started now: the flags and the environment are what they were, the
files are not.

A wrong setting is one line on stderr and exit status 2, as click does it.
"""

from __future__ import annotations

import math
import os
import sys
import tomllib
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fumi_core.runtime.addresses import Networks, SocketAddress, parse_address

F = TypeVar("F", bound=Callable[..., Any])
_ARGUMENTS = "fumi.arguments"


class AddressType(click.ParamType):  # type: ignore[type-arg]
    """ADDR: HOST:PORT, [V6]:PORT, :PORT, unix:/path or fd:N."""

    name = "addr"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SocketAddress:
        if isinstance(value, SocketAddress):
            return value
        try:
            return parse_address(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class NetworkType(click.ParamType):  # type: ignore[type-arg]
    """A CIDR block, an address, or ``unix``; stays text, since a set of them is what is used."""

    name = "cidr|unix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            Networks([str(value)])
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class SecondsType(click.FloatRange):
    """A finite number of seconds."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return seconds


class WorkersType(click.IntRange):
    """A number of processes; ``auto`` is one for each processor that this one may use."""

    name = "n|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto":
            return len(os.sched_getaffinity(0))
        return int(super().convert(value, param, ctx))


ADDRESS = AddressType()
NETWORK = NetworkType()
SECONDS = SecondsType(min=0.001)
SECONDS_OR_NONE = SecondsType(min=0)
WORKERS = WorkersType(min=1, max=1024)


class Program(click.Command):
    """A command whose errors are one line on stderr, with exit status 2."""

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **extra: Any) -> click.Context:
        arguments = list(args)  # click takes them out one by one
        ctx = super().make_context(info_name, args, *others, **extra)
        ctx.meta[_ARGUMENTS] = arguments
        return ctx

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"Error: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except click.Abort:
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)


def read_again(ctx: click.Context) -> click.Context:
    """The settings as they would be if the program were started now. Raises ClickException for a wrong one."""
    return ctx.command.make_context(ctx.info_name, list(ctx.meta[_ARGUMENTS]))


def given(ctx: click.Context) -> set[str]:
    """The names of the settings that were set, wherever, and not left to their defaults."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}


class SettingError(click.ClickException):
    """A setting that cannot work: one line on stderr, exit status 2."""

    exit_code = 2


def config_option(section: str) -> Callable[[F], F]:
    """``--config FILE.toml``: keys are the flags without the dashes in front, at top level or under ``[section]``."""

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
        help="Read settings from a TOML file.",
    )


def _read(ctx: click.Context, path: str, section: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from None
    tables = {name: value for name, value in document.items() if isinstance(value, dict)}
    if stray := set(tables) - {"core", "edge"}:
        raise click.BadParameter(f"{path}: unknown section [{sorted(stray)[0]}]; there are [core] and [edge]")
    known = {option[2:]: param.name for param in ctx.command.params for option in param.opts if option.startswith("--")}
    repeatable = {param.name for param in ctx.command.params if getattr(param, "multiple", False)}
    settings: dict[str, Any] = {}
    own = tables.get(section, {})
    for key, value in {**{k: v for k, v in document.items() if k not in tables}, **own}.items():
        name = known.get(key.replace("_", "-"))
        if name is None:
            raise click.BadParameter(f"{path}: unknown key {key!r}; the keys are the flags without dashes in front")
        settings[name] = _plain(path, key, value, many=name in repeatable)
    return settings


def _plain(path: str, key: str, value: Any, many: bool) -> Any:
    """A value as a flag could have it: repeatable ones are lists, and may be written without one."""
    values = value if isinstance(value, list) and many else [value]
    if not all(isinstance(each, str | int | float) for each in values):
        raise click.BadParameter(f"{path}: {key} is {'text, or a list of texts' if many else 'text, a number, true or false'}")
    return values if many else value
