"""The flags, with the environment and the file of --config, read again at a reload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import click

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.config_file import ListenerTable, listener_tables
from fumi_core.runtime.settings import given, read_again
from fumi_edge.program.flags import Flags
from fumi_edge.program.inner import Inner
from fumi_edge.program.settings import edge_settings, load_certificates
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.credentials import ClientSettings, Credentials
from fumi_edge.tls.policy import CertificateSettings

_ONCE = ("app", "listen", "metrics", "socket_mode", "starttls_listen", "user", "workers")
"""Settings of sockets and processes, which a reload cannot change."""


class Again(NamedTuple):
    """What was read. ``certificates`` has those of the settings: the objects of before if sources and TLS policy are the same."""

    flags: Flags
    tables: Sequence[ListenerTable]
    settings: EdgeSettings
    certificates: Mapping[CertificateSettings, Certificates]


class FlagSource:
    """The flags of this process, and how to read them again."""

    def __init__(self, ctx: click.Context, inner: Inner | None = None) -> None:
        self._ctx = ctx
        self._flags = cast(Flags, ctx.params)
        self._tables = listener_tables(ctx)
        self._inner = inner

    def read_again(
        self,
        loaded: Mapping[CertificateSettings, Certificates],
        credentials: Mapping[ClientSettings, Credentials],
        forking: bool,
    ) -> Again:
        """Read everything, and load the certificates that are not ``loaded``. Changes nothing; raises ClickException.

        ``credentials`` are those for TLS backends that are loaded. ``forking``: this process forks workers, which are to resume
        each other's sessions.
        """
        ctx = read_again(self._ctx)
        flags, tables = cast(Flags, ctx.params), listener_tables(ctx)
        if self._inner is None:
            settings = edge_settings(flags, tables, None, credentials)
        else:
            self._inner.check_settings(given(ctx), tables)
            settings = edge_settings(self._inner.defaults(flags, tables), tables, self._inner.core)
        certificates = load_certificates(settings, loaded)
        if forking:
            for each in certificates.keys() - loaded.keys():
                certificates[each].share_ticket_keys()
        return Again(flags, tables, settings, certificates)

    def take(self, again: Again) -> list[str]:
        """Note that the settings are in use. Returns the names of those that have changed and need a restart."""
        if self._inner is not None:
            self._inner.configure(again.flags)
        changed = [name for name in _ONCE if again.flags[name] != self._flags[name]]  # type: ignore[literal-required]
        if _places(again.tables) != _places(self._tables):
            changed.append("listener")
        return [name.replace("_", "-") for name in changed]


def _places(tables: Sequence[ListenerTable]) -> list[tuple[SocketAddress, str]]:
    """The parts of the listener tables that a reload cannot change."""
    return [(each.address, each.values["mode"]) for each in tables]
