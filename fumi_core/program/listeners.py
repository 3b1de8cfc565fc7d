"""The built-in app's listeners: that of --listen, or one for each ``[[core.listener]]`` table, with settings of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.config_file import ListenerKeys, listener_tables
from fumi_core.runtime.listening import ListenAddress, clash, passed
from fumi_core.runtime.settings import SettingError, given

LISTENER_KEYS = ListenerKeys(
    flags=(
        *("proxy-protocol", "trusted-proxy", "assume-tls", "deliver", "domain", "recipient-delimiter"),
        *("milter", "milter-failure", "size", "lmtp", "name", "banner", "bare-newlines", "lenient-addresses"),
        *("users", "dovecot-auth", "auth-required", "sender-login", "require-tls", "allow-insecure-auth"),
    )
)
"""What a ``[[core.listener]]`` table may contain beside its address."""

Key = tuple[SocketAddress, int] | None
"""Identifies a listener across reloads: its address, and how many tables before it have the same one. None: no table."""


class Listening(NamedTuple):
    """Addresses with the same settings, and the flags that were given for them."""

    key: Key
    places: Sequence[ListenAddress]
    settings: dict[str, Any]
    given: set[str]

    @property
    def name(self) -> str | None:
        """The address of a listener with a table of its own."""
        return None if self.key is None else str(self.key[0])


def listening(ctx: click.Context) -> list[Listening]:
    """The listeners of the settings. Raises SettingError.

    Without --listen and tables, the addresses that systemd passes come before the default.
    """
    settings, named, tables = ctx.params, given(ctx), listener_tables(ctx)
    if not tables:
        listen = settings["listen"] if "listen" in named else passed() or settings["listen"]
        return [Listening(None, [ListenAddress("--listen", each) for each in listen], settings, named)]
    section = tables[0].section
    if settings["app"]:
        raise SettingError(f"{section} belongs to the built-in app: remove the tables, or {settings['app']}")
    if "listen" in named:
        raise SettingError(f"--listen and {section} exclude each other: name all listeners in one of these ways")
    found: dict[Key, Listening] = {}
    for table in tables:
        number = sum(1 for key in found if key is not None and key[0] == table.address)
        key = table.address, number
        merged = {**settings, **table.values}
        found[key] = Listening(key, [ListenAddress(section, table.address)], merged, named | set(table.values))
    if problem := clash([place for each in found.values() for place in each.places]):
        raise SettingError(problem)
    return list(found.values())


@contextlib.contextmanager
def named(listener: Listening) -> Iterator[None]:
    """Errors about a listener with a table of its own begin with this table."""
    try:
        yield
    except SettingError as error:
        raise error if listener.key is None else SettingError(f"{listener.places[0]}: {error.message}") from None
