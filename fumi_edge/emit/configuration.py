"""Converts fumi-edge's flags to a configuration of HAProxy or stunnel: a file of haproxy/ or stunnel/ with the flags' values.

Comments at the top name the differences. Settings without a flag keep the values of the file. Only certificate paths are
read on this machine, so the configuration may be for another one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import click
from click.core import ParameterSource

from fumi_core.runtime.addresses import parse_address
from fumi_core.runtime.config_file import ListenerTable
from fumi_core.runtime.settings import SettingError
from fumi_edge.backends.addresses import is_destination
from fumi_edge.backends.tls import can_be_certified
from fumi_edge.emit import haproxy, stunnel
from fumi_edge.emit.notes import Flags, Service, missing, shortened
from fumi_edge.tls.pem import CertificateError, Pair, label
from fumi_edge.tls.policy import CIPHERS, Policy, protocols
from fumi_edge.tls.sources import find, give_keys

_PROGRAMS = {"haproxy": ("HAProxy", "#", haproxy.write), "stunnel": ("stunnel", ";", stunnel.write)}
PROGRAMS = tuple(_PROGRAMS)


def configuration(program: str, context: click.Context, tables: Sequence[tuple[ListenerTable, Flags]] = ()) -> str:
    """The text of a configuration for fumi-edge's flags. Raises SettingError for bad flags, and if no listener is supported.

    ``tables`` are the listener tables, each with the flags that are in use for it.
    """
    flags: Flags = context.params
    # A switch that is off may have been given, to override a file that turns it on.
    given = {
        name
        for name, value in flags.items()
        if value is not False and context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if "dev_mode" in given:
        raise SettingError("--emit: name a certificate and a backend; those of --dev are temporary")
    if "app" in given:
        raise SettingError(f"--emit: {flags['app']} runs in fumi-edge alone; name a --backend instead")
    for table, _ in tables:
        _on_one_line(f"the address of a {table.section} table", str(table.address))
    for each in (flags, *(own for _, own in tables)):
        _check(each)
    name, sign, write = _PROGRAMS[program]
    flags, services = _of_tables(flags, tables) if tables else (flags, _of_flags(flags))
    if not services:
        raise SettingError(
            f"--emit {program}: only fumi-edge supports STARTTLS; name a --listen for implicit TLS, or see haproxy/layer4.cfg"
        )
    given |= {flag for table, _ in tables for flag, value in table.values.items() if value is not False}
    notes, body = write(flags, given, services)
    notes = [*dict.fromkeys(note for each in services for note in missing(each.flags)), *notes]
    notes += dict.fromkeys(note for each in services for note in shortened(each.flags, given, name))
    lines = [f"Equivalent {name} configuration.{' Differences:' if notes else ''}", "", *notes]
    wrapped = (part for line in lines for part in (_wrap(line) if line else [""]))
    return "".join(f"{sign} {line}".rstrip() + "\n" for line in wrapped) + "\n" + body


def _of_flags(flags: Flags) -> list[Service]:
    listeners = tuple(flags.get("listen") or ()) or (() if flags.get("starttls_listen") else (parse_address(":465"),))
    return [Service(flags, listeners, _pairs(flags))] if listeners else []


def _of_tables(flags: Flags, tables: Sequence[tuple[ListenerTable, Flags]]) -> tuple[Flags, list[Service]]:
    """The flags with the addresses of the tables for STARTTLS, which are for the notes, and the services of the others."""
    starttls = [table.address for table, _ in tables if table.values.get("mode") == "starttls"]
    flags = {**flags, "starttls_listen": starttls, "starttls_setting": tables[0][0].section}
    return flags, [Service(own, [table.address], _pairs(own)) for table, own in tables if table.values.get("mode") != "starttls"]


def _check(flags: Flags) -> None:
    """Raises SettingError for values that fumi-edge would reject, too, and for those that no file can hold."""
    for flag, value in flags.items():
        for part in _each(value):
            _on_one_line(f"--{flag.replace('_', '-')}", str(part))
    try:
        protocols(flags.get("alpn") or "")
    except ValueError as error:
        raise SettingError(f"--alpn: {error}") from None
    try:
        Policy(ciphers=flags.get("ciphers", CIPHERS))
    except ValueError as error:
        raise SettingError(f"--ciphers: {error}") from None
    for address in flags.get("backend") or ():
        if not is_destination(address):
            raise SettingError(f"{address} is not a backend: write HOST:PORT, tls:HOST:PORT or unix:/path")
        name = flags.get("backend_name") or address.host
        if address.tls and not can_be_certified(name.removesuffix(".")):
            flag = "--backend-name" if flags.get("backend_name") else "--backend"
            raise SettingError(f"{flag}: {name!r} is not a host name or an IP address, so no certificate can be for it")


def _on_one_line(what: str, text: str) -> None:
    if "\n" in text or "\r" in text:
        raise SettingError(f"--emit: {what} contains a line end, which a configuration file cannot express")


def _pairs(flags: Flags) -> list[Pair]:
    """The certificates with their keys. A directory stands for the certificates that are in it now."""
    try:
        given = give_keys(flags.get("cert") or (), flags.get("key") or ())
        found = [pair for each in given for pair in find(each)]
    except CertificateError as error:
        raise SettingError(str(error)) from None
    for path in (label(source) for pair in found for source in pair if source is not None):
        _on_one_line(repr(path), path)
    return found


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, tuple) else (value,)


def _wrap(note: str) -> list[str]:
    # A command stays on one line, to be copied.
    return [note] if note.startswith("    ") else textwrap.wrap(note, 118, break_long_words=False, break_on_hyphens=False)
