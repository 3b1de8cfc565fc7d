"""What both writers need: the notes on what the other program does differently, and what its settings can hold."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fumi_core.runtime.addresses import SocketAddress

TIMES = ("connect_timeout", "idle_timeout", "handshake_timeout", "drain_timeout", "health_interval", "health_timeout")
LONGEST = (2**31 - 1) // 1000
"""Seconds of the longest time, some 24.8 days: both programs have it as milliseconds in 31 bits."""

Flags = Mapping[str, Any]
Emitted = tuple[list[str], str]
"""What is to be said, a note each, and the configuration."""

_NOT_ASKED = {"emit", "check", "dev_mode", "config", "version"}
"""Flags that are no setting of a terminator."""


def missing(flags: Flags) -> list[str]:
    """What fumi-edge does not start without, and a file has of its own."""
    needed = ("cert", "certificate"), ("backend", "backend")
    return [f"--{flag}: no {what} was named; below is the file's own." for flag, what in needed if not flags.get(flag)]


def header_notes(flags: Flags) -> list[str]:
    if flags.get("proxy_protocol") != "off":
        return []
    return ["--proxy-protocol off: fumi-core needs it too, and every client has this machine's address there."]


def starttls(flags: Flags, why: str) -> list[str]:
    listeners = ", ".join(map(str, flags.get("starttls_listen") or ()))
    return [f"--starttls-listen {listeners}: {why}"] if listeners else []


def lost(flags: Flags, given: Collection[str], carried: Collection[str], reasons: Mapping[str, str]) -> list[str]:
    """A note for each flag that was given and not carried over."""
    names = [name for name in flags if name in given and name not in carried and name not in _NOT_ASKED]
    return [f"--{name.replace('_', '-')}: {reasons.get(name, 'not carried over.')}" for name in names]


def shortened(flags: Flags, given: Collection[str], program: str) -> list[str]:
    """A note for each time that is shortened."""
    long = [name for name in TIMES if name in given and (flags.get(name) or 0) > LONGEST]
    return [f"--{name.replace('_', '-')}: {LONGEST} seconds, the longest that {program} takes." for name in long]


def group_of(user: str) -> str:
    """The group that fumi-edge would have; of a user of another machine, the one that is most often made with it."""
    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        return user


def of_kind(addresses: Iterable[SocketAddress], *kinds: str) -> list[SocketAddress]:
    return [address for address in addresses if address.kind in kinds]
