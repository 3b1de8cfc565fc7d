"""Notes on what the other program does differently, and limits of its settings."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fumi_core.runtime.addresses import SocketAddress
from fumi_edge.tls.pem import Pair

TIMES = ("connect_timeout", "idle_timeout", "handshake_timeout", "drain_timeout", "health_interval", "health_timeout")
LONGEST = (2**31 - 1) // 1000
"""Seconds, about 24.8 days: the longest time. Both programs store times as milliseconds in 31 bits."""

Flags = Mapping[str, Any]


class Service(NamedTuple):
    """Listeners for implicit TLS with the same settings: the flags, and the certificates with their keys.

    A listener with a table of its own is a service of its own; its flags are those of the edge with the table's values.
    """

    flags: Flags
    listeners: Sequence[SocketAddress]
    pairs: Sequence[Pair]


Emitted = tuple[list[str], str]
"""The notes on differences, and the configuration."""

_NOT_SETTINGS = {"emit", "check", "dev_mode", "config", "version"}
"""Flags that are not settings of a TLS proxy."""


def missing(flags: Flags) -> list[str]:
    """A note for each flag that fumi-edge requires and for which the template has a default."""
    needed = ("cert", "certificate"), ("backend", "backend")
    return [f"--{flag}: no {what} was named; the one below is an example." for flag, what in needed if not flags.get(flag)]


def header_notes(flags: Flags) -> list[str]:
    if flags.get("proxy_protocol") != "off":
        return []
    return ["--proxy-protocol off: fumi-core needs it too, and sees this machine's address for every client."]


def starttls(flags: Flags, why: str) -> list[str]:
    listeners = ", ".join(map(str, flags.get("starttls_listen") or ()))
    return [f"{flags.get('starttls_setting', '--starttls-listen')} {listeners}: {why}"] if listeners else []


def not_applied(flags: Flags, given: Collection[str], applied: Collection[str], reasons: Mapping[str, str]) -> list[str]:
    """A note for each flag that was given and has no effect on the configuration."""
    names = [name for name in flags if name in given and name not in applied and name not in _NOT_SETTINGS]
    return [f"--{name.replace('_', '-')}: {reasons.get(name, 'has no equivalent.')}" for name in names]


def shortened(flags: Flags, given: Collection[str], program: str) -> list[str]:
    """A note for each time that is shortened."""
    long = [name for name in TIMES if name in given and (flags.get(name) or 0) > LONGEST]
    return [f"--{name.replace('_', '-')}: {LONGEST} seconds, the longest that {program} accepts." for name in long]


def group_of(user: str) -> str:
    """The user's primary group. For a user who is not on this machine, the group of the same name, which most users have."""
    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        return user


def supported(services: Iterable[Service], unsupported: Collection[SocketAddress]) -> list[Service]:
    """The services without these listeners, and without those that then have none."""
    kept = [each._replace(listeners=[address for address in each.listeners if address not in unsupported]) for each in services]
    return [each for each in kept if each.listeners]


def of_kind(addresses: Iterable[SocketAddress], *kinds: str) -> list[SocketAddress]:
    return [address for address in addresses if address.kind in kinds]
