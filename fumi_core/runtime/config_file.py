"""``--config FILE.toml``: flags from a TOML file, shared by both programs, and ``[[SECTION.listener]]`` tables."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import click

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.files import read_file
from fumi_core.runtime.flag_types import ADDRESS
from fumi_core.runtime.settings import ACTIONS, nearest

F = TypeVar("F", bound=Callable[..., Any])
_TOO_LARGE_FOR_TOML = 1 << 63
"""The first integer too large for TOML."""
_MAX_SHOWN_CHARACTERS = 100
"""Characters of a value that are shown in an error."""


_TABLES = "fumi.listener_tables"
"""The key in a context's meta of the listener tables."""


class ListenerKeys(NamedTuple):
    """What a ``[[SECTION.listener]]`` table may contain beside ``address``: flags of the program, and keys of its own."""

    flags: tuple[str, ...]
    own: tuple[click.Option, ...] = ()


class ListenerTable(NamedTuple):
    """One ``[[SECTION.listener]]`` table: its address, and its other values by the names of their flags, as click passes them.

    ``section`` is what the file has above the table, with its brackets.
    """

    section: str
    address: SocketAddress
    values: Mapping[str, Any]


def listener_tables(ctx: click.Context) -> Sequence[ListenerTable]:
    """The listener tables of the file of --config, in their order."""
    tables: Sequence[ListenerTable] = ctx.meta.get(_TABLES, ())
    return tables


def config_option(section: str, listener: ListenerKeys | None = None) -> Callable[[F], F]:
    """``--config FILE.toml``: keys are the flags without their leading dashes, at top level or under ``[section]``.

    With ``listener``, ``[[section.listener]]`` tables are read, too, for ``listener_tables``.
    """

    def load(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value:
            ctx.default_map = {**(ctx.default_map or {}), **_read(ctx, value, section, listener)}

    return click.option(
        "--config",
        metavar="FILE.toml",
        type=click.Path(exists=True, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=load,
        help="Reads settings from this file.",
    )


def _read(ctx: click.Context, path: str, section: str, listener: ListenerKeys | None) -> dict[str, Any]:
    """The settings of the file, for click's default_map. Keeps the listener tables in ``ctx.meta``. Raises BadParameter."""
    document = _document(path)
    tables = {name: value for name, value in document.items() if isinstance(value, dict)}
    if stray := set(tables) - {"core", "edge"}:
        raise click.BadParameter(f"{path}: unknown section [{sorted(stray)[0]}]; there are [core] and [edge]")
    own = tables.get(section, {})
    if listener is not None and "listener" in own:
        own = {key: value for key, value in own.items() if key != "listener"}
        ctx.meta[_TABLES] = _listeners(ctx, path, f"[[{section}.listener]]", tables[section]["listener"], listener)
    common = {key: value for key, value in document.items() if key not in tables}
    if listener is not None and "listener" in common:
        raise click.BadParameter(f"{path}: unknown key 'listener': write [[{section}.listener]]")
    known = _known(ctx.command.get_params(ctx))
    settings: dict[str, Any] = {}
    for flag, (key, value) in {**_flags(path, common), **_flags(path, own)}.items():
        param = _param(path, known, flag, key)
        settings[str(param.name)] = _convertible(ctx, path, key, param, value)
    return settings


def _document(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(read_file(path).decode())
    except OSError as error:
        raise click.BadParameter(f"{path}: cannot read the file: {error.strerror}") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number with more digits than Python reads
        raise click.BadParameter(f"{path}: {error}") from None
    except RecursionError:
        raise click.BadParameter(f"{path}: nested too deeply") from None


def _listeners(ctx: click.Context, path: str, section: str, found: Any, keys: ListenerKeys) -> list[ListenerTable]:
    """The listener tables. Raises BadParameter."""
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise click.BadParameter(f"{path}: write each listener under a {section} of its own")
    flags = _known(ctx.command.get_params(ctx))
    known = {
        "address": click.Option(["--address"], type=ADDRESS),
        **_known(keys.own),
        **{each: flags[each] for each in keys.flags},
    }
    return [_listener(ctx, path, section, number, table, known) for number, table in enumerate(found, 1)]


def _listener(
    ctx: click.Context, path: str, section: str, number: int, table: dict[str, Any], known: Mapping[str, click.Parameter]
) -> ListenerTable:
    place = f"{path}: {section} {table.get('address') if isinstance(table.get('address'), str) else f'number {number}'}"
    values: dict[str, Any] = {}
    for flag, (key, value) in _flags(place, table).items():
        param = known.get(flag)
        if param is None:
            general = flag in _known(ctx.command.get_params(ctx)) and f"--{flag}" not in {*ACTIONS, "--config"}
            hint = f"it is for all listeners: write it under [{section.strip('[]').partition('.')[0]}]" if general else ""
            hint = hint or nearest(flag, known) or "see the README for the keys of a listener"
            raise click.BadParameter(f"{place}: unknown key {key!r}: {hint}")
        values[str(param.name)] = param.type_cast_value(ctx, _convertible(ctx, place, key, param, value))
    if "address" not in values:
        raise click.BadParameter(f'{place}: no address: add one, such as address = ":587"')
    return ListenerTable(section, values.pop("address"), values)


def _known(params: Iterable[click.Parameter]) -> dict[str, click.Parameter]:
    """The parameters by their flags, without the leading dashes."""
    return {option[2:]: param for param in params for option in param.opts if option.startswith("--")}


def _param(path: str, known: Mapping[str, click.Parameter], flag: str, key: str) -> click.Parameter:
    param = known.get(flag)
    if param is None or not param.name:
        keys = sorted(each for each in known if f"--{each}" not in {*ACTIONS, "--config"})
        hint = nearest(flag, keys) or "keys are the flags without the leading dashes"
        raise click.BadParameter(f"{path}: unknown key {key!r}: {hint}")
    if f"--{flag}" in {*ACTIONS, "--config"}:
        raise click.BadParameter(f"{path}: {key} is not a setting; give --{flag} on the command line")
    return param


def _convertible(ctx: click.Context, path: str, key: str, param: click.Parameter, value: Any) -> Any:
    """The value of a key, which its flag can convert. Raises BadParameter."""
    try:
        return _value(ctx, param, value)
    except click.BadParameter as error:
        raise click.BadParameter(f"{path}: {key} = {_shown(value)}: {error.message}") from None


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
        good, wanted = isinstance(value, str) or _shown(value) in param.type.choices, "a string, in quotes"
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
