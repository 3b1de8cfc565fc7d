"""The same settings as HAProxy's or stunnel's configuration: a file of haproxy/ or stunnel/ with the flags of fumi-edge in it.

What the other program cannot do is said in comments at the top; what no flag says stays as it is in the file. Nothing but
certificate paths is looked at, so the configuration may be for another machine.
"""

from __future__ import annotations

import grp
import math
import os
import pwd
import re
import shlex
import string
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import click
from click.core import ParameterSource

from fumi_core.runtime.addresses import SocketAddress, parse_address
from fumi_core.runtime.settings import SettingError
from fumi_edge.backends.dialing import is_destination
from fumi_edge.connection.inbound import LOOPBACK
from fumi_edge.tls.pem import CertificateError, Pair, label
from fumi_edge.tls.policy import CIPHERS, Policy
from fumi_edge.tls.sources import find, give_keys

_NAMES = {"haproxy": "HAProxy", "stunnel": "stunnel"}
PROGRAMS = tuple(_NAMES)
_TIMES = ("connect_timeout", "idle_timeout", "handshake_timeout", "drain_timeout", "health_interval", "health_timeout")
_LONGEST = (2**31 - 1) // 1000
"""Seconds of the longest time, some 24.8 days: both programs have it as milliseconds in 31 bits."""

Flags = Mapping[str, Any]
Emitted = tuple[list[str], str]
"""What is to be said, a note each, and the configuration."""

_NOT_ASKED = {"emit", "check", "dev_mode", "config", "version"}
"""Flags that are no setting of a terminator."""


def configuration(program: str, context: click.Context) -> str:
    """The text of a configuration for fumi-edge's flags. Raises SettingError where nothing is left that the program could do."""
    flags = context.params
    # A switch may be given to be off, over a file that has it on.
    given = {
        name
        for name, value in flags.items()
        if value is not False and context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if "dev_mode" in given:
        raise SettingError("--emit: name a certificate and a backend; those of --dev end with it")
    if named := [name for name, value in flags.items() if any("\n" in str(each) for each in _each(value))]:
        raise SettingError(f"--emit: --{named[0].replace('_', '-')} has a line end in it, which no configuration file can hold")
    listeners = tuple(flags.get("listen") or ()) or (() if flags.get("starttls_listen") else (parse_address(":465"),))
    emit, mark = {"haproxy": (_haproxy, "#"), "stunnel": (_stunnel, ";")}[program]
    if not listeners:
        raise SettingError(
            f"--emit {program}: STARTTLS is for fumi-edge alone; name a --listen for implicit TLS, or see haproxy/layer4.cfg"
        )
    _refuse_what_no_edge_would_take(flags)
    notes, body = emit(flags, given, listeners, _pairs(flags))
    notes = [*_missing(flags), *notes]
    notes += _longest(flags, given, program)
    lines = [f"Equivalent {_NAMES[program]} configuration.{' Differences:' if notes else ''}", "", *notes]
    wrapped = (part for line in lines for part in (_wrap(line) if line else [""]))
    return "".join(f"{mark} {line}".rstrip() + "\n" for line in wrapped) + "\n" + body


def _refuse_what_no_edge_would_take(flags: Flags) -> None:
    try:
        Policy(ciphers=flags.get("ciphers") or CIPHERS)
    except ValueError as error:
        raise SettingError(f"--ciphers: {error}") from None
    for address in flags.get("backend") or ():
        if not is_destination(address):
            raise SettingError(f"{address} is no backend: write HOST:PORT or unix:/path")


def _missing(flags: Flags) -> list[str]:
    """What fumi-edge does not start without, and a file has of its own."""
    needed = ("cert", "certificate"), ("backend", "backend")
    return [f"--{flag}: no {what} was named; below is the file's own." for flag, what in needed if not flags.get(flag)]


def _header_notes(flags: Flags) -> list[str]:
    if flags.get("proxy_protocol") != "off":
        return []
    return ["--proxy-protocol off: fumi-core needs it too, and every client has this machine's address there."]


def _group_of(user: str) -> str:
    """The group that fumi-edge would have; of a user of another machine, the one that is most often made with it."""
    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        return user


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, tuple) else (value,)


def _wrap(note: str) -> list[str]:
    # A command is to be copied whole.
    return [note] if note.startswith("    ") else textwrap.wrap(note, 118, break_long_words=False, break_on_hyphens=False)


def _pairs(flags: Flags) -> list[Pair]:
    """The certificates with their keys; of a directory, those that are in it now."""
    try:
        given = give_keys(flags.get("cert") or (), flags.get("key") or ())
        return [pair for each in given for pair in find(each)]
    except CertificateError as error:
        raise SettingError(str(error)) from None


def _template(name: str) -> str:
    """A file without the comment at its top, which speaks of the file."""
    return (files("fumi_edge") / "templates" / name).read_text("utf-8").partition("\n\n")[2]


def _lost(flags: Flags, given: Collection[str], carried: Collection[str], reasons: Mapping[str, str]) -> list[str]:
    """A note for each flag that was given and not carried over."""
    lost = [name for name in flags if name in given and name not in carried and name not in _NOT_ASKED]
    return [f"--{name.replace('_', '-')}: {reasons.get(name, 'not carried over.')}" for name in lost]


def _longest(flags: Flags, given: Collection[str], program: str) -> list[str]:
    """A note for each time that is shortened."""
    long = [name for name in _TIMES if name in given and (flags.get(name) or 0) > _LONGEST]
    return [f"--{name.replace('_', '-')}: {_LONGEST} seconds, the longest that {_NAMES[program]} takes." for name in long]


def _starttls(flags: Flags, why: str) -> list[str]:
    listeners = ", ".join(map(str, flags.get("starttls_listen") or ()))
    return [f"--starttls-listen {listeners}: {why}"] if listeners else []


# HAProxy


class _Variables(string.Template):
    """The environment variables of an HAProxy file; those without a value stay."""

    pattern = r"\$(?:(?P<escaped>(?!))|(?P<named>(?!))|\{FUMI_(?P<braced>[A-Z0-9_]+)-[^}]*\}|(?P<invalid>(?!)))"  # type: ignore[assignment]


_HAPROXY_CARRIES = {
    *("listen", "starttls_listen", "cert", "key", "backend", "balance", "health_interval", "proxy_protocol", "accept_proxy"),
    *("trusted_proxy", "client_ca", "client_cert", "min_tls", "ciphers", "alpn", "metrics", "connect_timeout", "idle_timeout"),
    *(
        "handshake_timeout",
        "health_timeout",
        "max_clients",
        "max_clients_per_ip",
        "rate_per_ip",
        "drain_timeout",
        "socket_mode",
        "log_level",
        "user",
    ),
}
_HAPROXY_REASONS = {
    "require_tls": "is for STARTTLS listeners.",
    "hide_starttls": "is for STARTTLS listeners.",
    "cert_reload_interval": "a reload (SIGUSR2 with -W) reads certificates again, and nothing else does.",
    "log_format": "write a log-format of your own.",
}


def _haproxy(flags: Flags, given: Collection[str], listeners: Sequence[SocketAddress], pairs: list[Pair]) -> Emitted:
    text = _template("haproxy.cfg")
    if "drain_timeout" not in given:
        # fumi-edge's default is for a stop; in HAProxy the same limit would cut sessions off at every reload.
        flags = {**flags, "drain_timeout": None}
    unfit = _of(listeners, "fd")
    listeners = [each for each in listeners if each not in unfit]
    if not listeners:
        raise SettingError(f"--emit haproxy: nobody hands {unfit[0]} to HAProxy; name HOST:PORT or unix:/path")
    if flags.get("metrics") and _of([flags["metrics"]], "fd"):
        unfit.append(flags["metrics"])
        flags = {**flags, "metrics": None}
    if not flags.get("metrics") and "metrics" in flags:
        text = text.partition("\n.if feature(PROMEX)")[0]
    if flags.get("user"):
        group = _quoted(_group_of(flags["user"]))[1:-1]
        text = re.sub(r"\{FUMI_GROUP-[^}]*\}", lambda _: f"{{FUMI_GROUP-{group}}}", text)
    lines = _drop(text.splitlines(), _unset(flags))
    lines = [new for line in lines for new in _haproxy_line(line, flags, pairs)]
    body = _Variables("\n".join(lines) + "\n").safe_substitute(_haproxy_values(flags, listeners, pairs))
    notes = _starttls(flags, "HAProxy has none. haproxy/layer4.cfg puts it in front of fumi-edge --accept-proxy.")
    notes += [f"{address}: left out; nobody hands it to HAProxy." for address in unfit]
    notes += _header_notes(flags)
    notes += _key_notes(pairs)
    notes += [f"{address}: a client on a Unix socket has no address in HAProxy's header." for address in _of(listeners, "unix")]
    notes.append("A client is disconnected without 421 when no core is available, and when its address has reached a limit.")
    if flags.get("max_clients"):
        notes.append("--max-clients: one client more waits to be accepted.")
    if flags.get("drain_timeout") is not None:
        notes.append("--drain-timeout: sessions that a reload finds may go on no longer either.")
    notes.append("--handshake-timeout: before version 3.0, --idle-timeout is for handshakes too.")
    notes += _lost(flags, given, _HAPROXY_CARRIES, _HAPROXY_REASONS)
    return notes, re.sub(r"\n{3,}", "\n\n", body)


def _of(addresses: Iterable[SocketAddress], *kinds: str) -> list[SocketAddress]:
    return [address for address in addresses if address.kind in kinds]


def _key_notes(pairs: Iterable[Pair]) -> list[str]:
    """HAProxy reads a key from the certificate's file, or from one of that name with .key behind."""
    apart = [(label(cert), label(key)) for cert, key in pairs if key is not None]
    missing = [(cert, key) for cert, key in apart if key not in (cert, cert + ".key")]
    if not missing:
        return []
    links = [f"    ln -s {shlex.quote(os.path.abspath(key))} {shlex.quote(cert + '.key')}" for cert, key in missing]
    return ["HAProxy reads the key of a certificate from a file beside it. Once:", *links]


def _drop(lines: Iterable[str], unwanted: Callable[[str], bool]) -> list[str]:
    """Without these lines, and without the comments above them."""
    kept: list[str] = []
    for line in lines:
        if not unwanted(line):
            kept.append(line)
            continue
        while kept and kept[-1].lstrip().startswith("#"):
            kept.pop()
    return kept


def _unset(flags: Flags) -> Callable[[str], bool]:
    """Which lines of an HAProxy file are for what the flags leave out."""
    out = [flag for flag in ("max_clients", "max_clients_per_ip", "rate_per_ip") if flag in flags and flags[flag] is None]
    words = ["core2", *(f"{{FUMI_{flag.upper()}-" for flag in out)]
    if {"max_clients_per_ip", "rate_per_ip"} <= set(out):
        words += ["backend clients", "stick-table", "track-sc0"]
    if flags.get("health_interval") == 0:
        words.append("smtpchk")
    return lambda line: any(word in line for word in words)


def _haproxy_line(line: str, flags: Flags, pairs: Sequence[Pair]) -> list[str]:
    """What becomes of one line, its variables apart."""
    word = line.split(maxsplit=1)[0] if line.strip() else ""
    if word == "bind" and " ssl " in line:
        return [line + _bind_options(flags, pairs), *_trust(flags)]
    if word == "server":
        count = len(flags.get("backend") or ()) or 1
        return [line.replace("core1", f"core{n}").replace("BACKEND_1", f"BACKEND_{n}") for n in range(1, count + 1)]
    if word == "default-server":
        sends = {"v1": "send-proxy", "off": ""}.get(flags.get("proxy_protocol", "v2"))
        if sends is not None:
            line = re.sub(r"send-proxy-v2-ssl-cn proxy-v2-options \S+", sends, line)
        return [line if flags.get("health_interval") != 0 else line.partition(" check ")[0]]
    if word == "tcp-request" and flags.get("accept_proxy"):
        # The first address there is is the balancer's.
        line = line.replace("tcp-request connection", "tcp-request session")
    rate = flags.get("rate_per_ip")
    return [line.replace("conn_rate(1m)", f"conn_rate({rate.seconds}s)") if rate else line]


def _bind_options(flags: Flags, pairs: Sequence[Pair]) -> str:
    options = [f"crt {_quoted(label(cert))}" for cert, _ in pairs[1:]]
    if flags.get("client_ca"):
        options.append(f"ca-file {_quoted(flags['client_ca'])} verify {flags.get('client_cert') or 'optional'}")
    if flags.get("alpn"):
        options.append(f"alpn {_quoted(','.join(name.strip() for name in flags['alpn'].split(',')))}")
    if flags.get("accept_proxy"):
        options.append("accept-proxy")
    if flags.get("socket_mode") is not None:
        options.append(f"mode {flags['socket_mode']:03o}")
    return "".join(f" {option}" for option in options)


def _trust(flags: Flags) -> list[str]:
    """Who may send the header of --accept-proxy; a Unix socket's peer has no source that could be found."""
    if not flags.get("accept_proxy"):
        return []
    trusted = flags.get("trusted_proxy") or LOOPBACK
    networks = " ".join(each for each in trusted if each != "unix")
    strangers = ["{ src -m found }"] * ("unix" in trusted) + [f"!{{ src {networks} }}"] * bool(networks)
    return [f"    tcp-request connection reject if {' '.join(strangers)}"]


def _haproxy_values(flags: Flags, listeners: Sequence[SocketAddress], pairs: Sequence[Pair]) -> dict[str, str]:
    """The values of the variables, as they stand between double quotes."""
    values: dict[str, Any] = {"LISTEN": ",".join(map(_haproxy_listener, listeners))}
    if pairs:
        values["CERT"] = label(pairs[0].cert)
    for number, address in enumerate(flags.get("backend") or (), 1):
        values[f"BACKEND_{number}"] = f"unix@{address.path}" if address.kind == "unix" else _host(address, "127.0.0.1")
    for flag in ("balance", "min_tls", "ciphers", "max_clients", "max_clients_per_ip", "user"):
        values[flag.upper()] = flags.get(flag)
    for flag in _TIMES:
        seconds = flags.get(flag)
        values[flag.upper()] = None if seconds is None else f"{max(1, math.ceil(min(seconds, _LONGEST) * 1000))}ms"
    if flags.get("rate_per_ip"):
        values["RATE_PER_IP"] = flags["rate_per_ip"].clients
    if flags.get("metrics"):
        values["METRICS"] = _haproxy_listener(flags["metrics"])
    if flags.get("log_level"):
        values["LOG_LEVEL"] = {"error": "err"}.get(flags["log_level"], flags["log_level"])
    return {name: _quoted(str(value))[1:-1] for name, value in values.items() if value is not None}


def _haproxy_listener(address: SocketAddress) -> str:
    if address.kind == "tcp" and not address.host:
        return f":{address.port},[::]:{address.port}"
    return f"unix@{address.path}" if address.kind == "unix" else str(address)


def _host(address: SocketAddress, default: str) -> str:
    return str(address) if address.host else f"{default}:{address.port}"


def _quoted(text: str) -> str:
    """Between double quotes, in which HAProxy knows these three characters."""
    return '"' + re.sub(r'([\\"$])', r"\\\1", text) + '"'


# stunnel

_STUNNEL_CARRIES = {
    *("listen", "starttls_listen", "cert", "key", "backend", "balance", "proxy_protocol", "client_ca", "client_cert"),
    *("min_tls", "ciphers", "connect_timeout", "idle_timeout", "handshake_timeout", "log_level", "user"),
}
_STUNNEL_REASONS = {
    "accept_proxy": "stunnel reads no PROXY header: it cannot stand behind such a balancer.",
    "trusted_proxy": "see --accept-proxy.",
    "alpn": "stunnel negotiates none.",
    "max_clients": "half of what ulimit -n allows.",
    "max_clients_per_ip": "stunnel does not count by address; a packet filter can.",
    "rate_per_ip": "stunnel does not count by address; a packet filter can.",
    "health_timeout": "see --health-interval.",
    "health_interval": "a core is found gone by the client that would have had it.",
    "metrics": "stunnel has none.",
    "socket_mode": "the umask decides.",
    "drain_timeout": "SIGTERM ends every session.",
    "require_tls": "is for STARTTLS listeners.",
    "hide_starttls": "is for STARTTLS listeners.",
    "cert_reload_interval": "a reload (SIGHUP) reads certificates again, and nothing else does.",
    "log_format": "stunnel has its own.",
}


def _stunnel(flags: Flags, given: Collection[str], listeners: Sequence[SocketAddress], pairs: list[Pair]) -> Emitted:
    proxying = flags.get("proxy_protocol", "v2") != "off"
    unfit = _of(listeners, "fd", *(["unix"] if proxying else []))
    if len(unfit) == len(listeners):
        raise SettingError(f"--emit stunnel: {unfit[0]} is no listener for stunnel with a PROXY header; name HOST:PORT")
    general, _, service = _template("stunnel.conf").partition("[smtps]\n")
    body = _set(general.splitlines(), _stunnel_settings(flags))
    for number, address in enumerate((each for each in listeners if each not in unfit), 1):
        own = {"accept": [f"accept = {_bare(address, '::')}"], **_service_settings(flags, pairs)}
        name = f"[smtps-{number}]" if number > 1 else "[smtps]"
        body += [name, *_set(service.splitlines(), own), *_client_certificates(flags), ""]
    notes = _starttls(flags, "stunnel has one (protocol = smtp), but not together with a PROXY header: that is for fumi-edge.")
    notes += [f"--listen {address}: left out." for address in unfit]
    notes += _header_notes(flags)
    if proxying:
        notes.append(
            "The header is version 1, which tells the client's address and nothing of TLS: neither version, cipher, server name,"
            " nor certificate, and no id. Start the core with --assume-tls, and let nobody past stunnel to its port."
        )
    if len(flags.get("backend") or ()) > 1 and flags.get("balance", "leastconn") == "leastconn":
        notes.append("--balance leastconn: each in turn.")
    notes += [
        f"--cert {label(cert)}: in a service of its own for each name, with sni = smtps:NAME and cert = {label(cert)}."
        for cert, _ in pairs[1:]
    ]
    notes += _lost(flags, given, _STUNNEL_CARRIES, _STUNNEL_REASONS)
    return notes, "\n".join(body).rstrip() + "\n"


def _set(lines: Iterable[str], settings: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of ``option = value``, those of some options replaced by others; the comment above goes with an option that does."""
    kept = _drop(lines, lambda line: settings.get(_option(line)) == [])
    return [new for line in kept for new in settings.get(_option(line), [line])]


def _option(line: str) -> str:
    return line.partition(" = ")[0]


def _stunnel_settings(flags: Flags) -> dict[str, list[str]]:
    """What is said once, for all services."""
    values = {
        "debug": {"error": "err"}.get(flags.get("log_level", ""), flags.get("log_level")),
        "sslVersionMin": f"TLSv{flags['min_tls']}" if flags.get("min_tls") else None,
        "ciphers": flags.get("ciphers"),
        "setuid": flags.get("user"),
        "setgid": _group_of(flags["user"]) if flags.get("user") else None,
    }
    for option, flag in (("busy", "handshake"), ("connect", "connect"), ("idle", "idle")):
        seconds = flags.get(f"{flag}_timeout")
        values[f"TIMEOUT{option}"] = None if seconds is None else str(math.ceil(min(seconds, _LONGEST)))
    return {option: [f"{option} = {value}"] for option, value in values.items() if value}


def _service_settings(flags: Flags, pairs: Sequence[Pair]) -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    if backends := flags.get("backend"):
        targets = [_bare(address, "127.0.0.1") for address in backends]
        settings["connect"] = [f"connect = {target}" for target in targets]
        if len(targets) > 1:
            settings["connect"].append("failover = " + ("prio" if flags.get("balance") == "first" else "rr"))
    if pairs:
        cert, key = pairs[0]
        settings["cert"] = [f"cert = {label(cert)}", *([f"key = {label(key)}"] if key is not None else [])]
    if flags.get("proxy_protocol") == "off":
        settings["protocol"] = []
    return settings


def _client_certificates(flags: Flags) -> list[str]:
    if not flags.get("client_ca"):
        return []
    required = "yes" if flags.get("client_cert") == "required" else "no"
    return [f"CAfile = {flags['client_ca']}", "verifyChain = yes", f"requireCert = {required}"]


def _bare(address: SocketAddress, default: str) -> str:
    """stunnel has no brackets, what is behind the last colon is the port; and it knows a path by its first character."""
    if address.kind == "unix":
        return os.path.abspath(address.path)
    return f"{address.host or default}:{address.port}"
