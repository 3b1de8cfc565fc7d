"""The flags, with the environment and the file of --config, read again at a reload."""

from __future__ import annotations

from typing import NamedTuple, cast

import click

from fumi_core.runtime.settings import read_again
from fumi_edge.program.inner import Inner
from fumi_edge.program.settings import Flags, edge_settings, load_certificates
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates

_ONCE = ("app", "listen", "metrics", "socket_mode", "starttls_listen", "user", "workers")
"""Settings of sockets and processes, which a reload cannot change."""


class Again(NamedTuple):
    """What was read. ``certificates`` is None if their sources and the TLS policy are the same as before."""

    flags: Flags
    settings: EdgeSettings
    certificates: Certificates | None


class FlagSource:
    """Where the flags of this process came from."""

    def __init__(self, ctx: click.Context, inner: Inner | None = None) -> None:
        self._ctx = ctx
        self._flags = cast(Flags, ctx.params)
        self._inner = inner

    def read_again(self, before: EdgeSettings, forking: bool) -> Again:
        """Read everything, and load the certificates if others are named. Changes nothing; raises ClickException.

        ``forking``: this process forks workers, which are to resume each other's sessions.
        """
        flags = cast(Flags, read_again(self._ctx).params)
        wanted = flags if self._inner is None else self._inner.defaults(flags)
        settings = edge_settings(wanted, None if self._inner is None else self._inner.core)
        certificates = None
        if (settings.certificates, settings.tls) != (before.certificates, before.tls):
            certificates = load_certificates(settings)
            if forking:
                certificates.share_ticket_keys()
        return Again(flags, settings, certificates)

    def take(self, again: Again) -> list[str]:
        """The settings are in use now. Returns the names of those that have changed and need a restart."""
        if self._inner is not None:
            self._inner.configure(again.flags)
        changed = [name for name in _ONCE if again.flags[name] != self._flags[name]]  # type: ignore[literal-required]
        return [name.replace("_", "-") for name in changed]
