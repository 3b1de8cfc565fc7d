"""How both programs read their settings: flags, then environment variables, then ``--config FILE.toml``, then defaults.

A reload reads them as if the program were started now: with the flags and environment of its start, and the files' new content.

A wrong setting is one line on stderr and exit status 2, as with click.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from fumi_core.runtime.addresses import Networks, SocketAddress, parse_address
from fumi_core.runtime.files import read_file
from fumi_core.runtime.flag_groups import GroupedCommand
from fumi_core.runtime.streams import complete

F = TypeVar("F", bound=Callable[..., Any])
_ARGUMENTS = "fumi.arguments"
_ACTIONS = frozenset(("--check", "--dev", "--emit", "--hash-password", "--help", "--version"))
"""Flags that choose an action for one run. They are not settings, so neither a variable nor a configuration key can give them."""
_IMAGE_TAG = "VERSION"
"""FUMI_EDGE_VERSION commonly holds an image's tag, so it is ignored and not an unknown variable."""

CONFIGURATION_OK = "configuration OK"
"""Printed by --check when everything is valid."""
_KUBERNETES_VARIABLE = re.compile(
    r"(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT=\w+://.*|PORT_\d+_[A-Z]+=\w+://.*|PORT_\d+_[A-Z]+_(ADDR|PORT|PROTO)=.*)"
)
"""Variables that Kubernetes sets for a Service with the program's name. FUMI_EDGE_PORT=465 is not one of them."""
_MODE = re.compile(r"0?[0-7]{3}")
_TOO_LARGE_FOR_TOML = 1 << 63
"""The first integer too large for TOML."""
_MAX_SHOWN_CHARACTERS = 100
"""Characters of a value that are shown in an error."""
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}
"""What both programs tell click; the width is that of ``--help``, in characters."""


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
            return parse_address(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class NameType(click.ParamType):  # type: ignore[type-arg]
    """A non-empty name, of a file or a user."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("must not be empty", param, ctx)
        return str(value)


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
NETWORK = NetworkType()
SECONDS = SecondsType(min=0.001)
SECONDS_OR_ZERO = SecondsType(min=0)
MODE = ModeType()
COUNT = CountType("a whole number", 100, min=1)
BYTES = CountType("a number of bytes", 25_000_000, min=1)
WORKERS = WorkersType('a number of processes or "auto"', 4, min=1, max=1024)


class Program(GroupedCommand):
    """A command: errors are one line on stderr, exit status 2. Settings, but not actions, may be environment variables."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        extra["context_settings"] = {**_CONTEXT, **(extra.get("context_settings") or {})}
        super().__init__(*args, **extra)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.help = "Prints the flags and exits."
        return option

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        for param in params:
            # FUMI_EDGE_VERSION commonly holds an image's tag.
            if isinstance(param, click.Option) and not _ACTIONS.isdisjoint(param.opts):
                param.allow_from_autoenv = False
        return params

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **extra: Any) -> click.Context:
        arguments = list(args)  # click removes them one by one
        ctx = super().make_context(info_name, args, *others, **extra)
        ctx.meta[_ARGUMENTS] = arguments
        return ctx

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError:
            # An invalid variable may be the cause.
            self._check_variables(ctx)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        self._check_variables(ctx)
        return super().invoke(ctx)

    def _check_variables(self, ctx: click.Context) -> None:
        """Raises SettingError for an unknown variable: a misspelt name, such as one for --require-tls, would have no effect."""
        prefix = f"{ctx.auto_envvar_prefix}_"
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        actions = {name: option for option in options for name in _names(option) if not _ACTIONS.isdisjoint(option.opts)}
        known = {str(option.name).upper() for option in options} - set(actions)
        for variable in sorted(each for each in os.environ if each.startswith(prefix)):
            name, value = variable.removeprefix(prefix), os.environ[variable]
            if name in actions:
                if name != _IMAGE_TAG:
                    flag = actions[name].opts[-1]
                    raise SettingError(f"variable {variable}: {flag} is not a setting; give it on the command line")
            elif name in known:
                if "\r" in value:
                    raise SettingError(f"variable {variable} contains a carriage return: save its file with Unix line ends")
            elif not _KUBERNETES_VARIABLE.fullmatch(f"{name}={value}"):
                hint = _nearest(name, known, prefix) or "every flag in --help can be a variable"
                raise SettingError(f"unknown variable {variable}: {hint}")

    def main(self, *args: Any, **extra: Any) -> Any:
        complete()
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"Error: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except click.Abort:
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)


def _names(option: click.Option) -> set[str]:
    """The variables for this option, without the prefix: by the option's name and by each of its spellings."""
    return {str(option.name).upper(), *(each.lstrip("-").replace("-", "_").upper() for each in option.opts)}


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str | None:
    near = difflib.get_close_matches(name, known, 1)
    return f"is it {prefix}{near[0]}?" if near else None


def read_again(ctx: click.Context) -> click.Context:
    """The settings as they would be if the program were started now. Raises ClickException for an invalid one."""
    return ctx.command.make_context(ctx.info_name, list(ctx.meta[_ARGUMENTS]))


def given(ctx: click.Context) -> set[str]:
    """The names of the settings that were set explicitly, by flag, variable or file."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}


class SettingError(click.ClickException):
    """An invalid setting: one line on stderr, exit status 2."""

    exit_code = 2


def check_mode(mode: int | None, addresses: Iterable[SocketAddress]) -> None:
    """Raises SettingError for a --socket-mode if this program creates no Unix socket."""
    if mode is not None and all(each.kind != "unix" for each in addresses):
        raise SettingError("--socket-mode is for Unix listeners: listen on unix:/path, or remove it")


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
            keys = sorted(each for each in known if f"--{each}" not in {*_ACTIONS, "--config"})
            hint = _nearest(flag, keys) or "keys are the flags without the leading dashes"
            raise click.BadParameter(f"{path}: unknown key {key!r}: {hint}")
        if f"--{flag}" in {*_ACTIONS, "--config"}:
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
