"""fumi-edge's flags as HAProxy's configuration: haproxy/two-nodes.cfg with their values in it."""

from __future__ import annotations

import math
import os
import re
import shlex
import string
from collections.abc import Collection, Iterable, Sequence
from ipaddress import ip_address
from typing import Any

from fumi_core.runtime.addresses import THIS_HOST, SocketAddress
from fumi_core.runtime.settings import SettingError
from fumi_edge.backends.addresses import BackendAddress
from fumi_edge.emit.notes import (
    LONGEST,
    TIMES,
    Emitted,
    Flags,
    Service,
    group_of,
    header_notes,
    not_applied,
    of_kind,
    starttls,
    supported,
)
from fumi_edge.emit.template import Line, haproxy_template, without
from fumi_edge.tls.pem import Pair, label
from fumi_edge.tls.policy import protocols

_APPLIED = {
    *("listen", "starttls_listen", "cert", "key", "balance", "health_interval", "proxy_protocol", "accept_proxy"),
    *("backend", "backend_ca", "backend_name", "backend_cert", "backend_key"),
    *("trusted_proxy", "client_ca", "client_cert", "min_tls", "ciphers", "alpn", "metrics", "connect_timeout", "idle_timeout"),
    *("handshake_timeout", "health_timeout", "max_clients", "max_clients_per_ip", "rate_per_ip", "drain_timeout"),
    *("socket_mode", "log_level", "user"),
}
"""The flags that have an equivalent in HAProxy."""
_MAX_LISTENER_PATH = 95
"""Bytes of a Unix socket's path: HAProxy binds it with a dot, its PID (7 digits) and ``.tmp`` appended, and renames it."""
_TCP_USER_TIMEOUT = 'tcp-ut "${FUMI_NODE_TCP_USER_TIMEOUT-25s}"'
_REASONS = {
    "require_tls": "applies to STARTTLS listeners only.",
    "hide_starttls": "applies to STARTTLS listeners only.",
    "cert_reload_interval": "certificates are reloaded only on SIGUSR2, with -W.",
    "log_format": "write your own log-format.",
}


def write(flags: Flags, given: Collection[str], services: Sequence[Service]) -> Emitted:
    """The notes and the configuration. Raises SettingError if HAProxy supports none of the listeners."""
    if "drain_timeout" not in given:
        # fumi-edge's default is for a stop; in HAProxy the same limit would cut sessions off at every reload.
        flags = {**flags, "drain_timeout": None}
    unsupported = of_kind([each for service in services for each in service.listeners], "fd")
    services = supported(services, unsupported)
    if not services:
        raise SettingError(
            f"--emit haproxy: HAProxy is started without the descriptor {unsupported[0]}; name HOST:PORT or unix:/path"
        )
    if flags.get("metrics") and of_kind([flags["metrics"]], "fd"):
        unsupported.append(flags["metrics"])
        flags = {**flags, "metrics": None}
    return _notes(flags, given, services, unsupported), _filled_in(flags, services)


def _notes(flags: Flags, given: Collection[str], services: Sequence[Service], unsupported: Sequence[SocketAddress]) -> list[str]:
    notes = starttls(
        flags, "HAProxy does not support STARTTLS for SMTP. haproxy/layer4.cfg puts HAProxy in front of fumi-edge --accept-proxy."
    )
    notes += [f"{address}: omitted; HAProxy is started without this descriptor." for address in unsupported]
    notes += dict.fromkeys(note for service in services for note in header_notes(service.flags))
    notes += _key_notes(dict.fromkeys(pair for service in services for pair in service.pairs))
    notes += dict.fromkeys(note for service in services for note in _tls_backend_notes(service.flags))
    local = of_kind([each for service in services for each in service.listeners], "unix")
    notes += [f"{address}: HAProxy's PROXY header has no client address for a Unix socket." for address in local]
    notes.append("A client is disconnected without 421 when no core is available, and when its address has reached a limit.")
    notes.append("A client or core that is alive but reads nothing for 30 or 25 s (tcp-ut) is disconnected.")
    if flags.get("max_clients"):
        notes.append("--max-clients: clients above the limit wait to be accepted instead of being rejected.")
    if len(services) > 1 and (flags.get("max_clients_per_ip") or flags.get("rate_per_ip")):
        notes.append("Limits for one address: each listener counts for itself.")
    if flags.get("drain_timeout") is not None:
        notes.append("--drain-timeout: also limits the sessions that continue after a reload.")
    notes.append("--handshake-timeout: HAProxy before 3.0 uses --idle-timeout for handshakes.")
    return notes + not_applied(flags, given, _APPLIED, _REASONS)


def _key_notes(pairs: Iterable[Pair]) -> list[str]:
    """The links to keys that HAProxy would not find: it looks in the certificate's file, and in that name with .key appended."""
    apart = [(label(cert), label(key)) for cert, key in pairs if key is not None]
    missing = [(cert, key) for cert, key in apart if key not in (cert, cert + ".key")]
    if not missing:
        return []
    links = [f"    ln -s {shlex.quote(os.path.abspath(key))} {shlex.quote(cert + '.key')}" for cert, key in missing]
    return ["HAProxy reads a certificate's key from the same file, or from that name with .key appended. Run once:", *links]


def _tls_backend_notes(flags: Flags) -> list[str]:
    """Notes for TLS backends: HAProxy matches DNS names only, and reads certificate and key from one file."""
    names = [_verified(each, flags) for each in flags.get("backend") or () if each.tls]
    notes = [
        f"{name}: HAProxy compares DNS names only, so a certificate for this IP address is rejected. Give it a name, and add"
        " --backend-name."
        for name in names
        if _is_ip(name)
    ]
    if names and flags.get("backend_cert") and flags.get("backend_key"):
        cert, key = flags["backend_cert"], flags["backend_key"]
        notes.append("HAProxy reads the key of --backend-cert from the same file. Run once:")
        notes.append(f"    cat {shlex.quote(cert)} {shlex.quote(key)} > {shlex.quote(cert + '.both')}")
    return notes


def _filled_in(flags: Flags, services: Sequence[Service]) -> str:
    """The template with the flags' values, without the lines that the flags do not need, and with each service's section."""
    lines = haproxy_template()
    begin = next(number for number, line in enumerate(lines) if line.name == "limits-per-ip")
    while lines[begin - 1].comment:
        begin -= 1
    end = next(number for number, line in enumerate(lines) if line.name == "metrics")
    everywhere = Service(flags, (), ())
    parts = [_part(lines[:begin], everywhere, flags)]
    for number, each in enumerate(services, 1):
        parts.append(_numbered(_part(lines[begin:end], each, flags) + _tls_sections(each.flags), number))
    parts.append(_part(lines[end:], everywhere, flags))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _part(template: Sequence[Line], service: Service, general: Flags) -> str:
    """Lines of the template with the values of a service, without those that all services share."""
    lines = without(template, _unneeded(service.flags).__contains__)
    text = "\n".join(new for line in lines for new in _rewritten(line, service, general))
    return _Variables(text).safe_substitute(_values(service))


def _numbered(section: str, number: int) -> str:
    """The section of a service after the first, with names of its own."""
    if number == 1:
        return section
    names = re.compile(r"^(?:backend|listen) \w+$|(?<=table )clients|(?<=\()clients(?=\))|(?<=abns@)fumi-core\d+", re.MULTILINE)
    return names.sub(lambda name: f"{name[0]}-{number}", section)


def _unneeded(flags: Flags) -> set[str]:
    """The marks of the lines that these flags do not need."""
    names = {"other-backends"}
    names |= {
        flag.replace("_", "-")
        for flag in ("max_clients", "max_clients_per_ip", "rate_per_ip", "metrics")
        if flags.get(flag) is None
    }
    if {"max-clients-per-ip", "rate-per-ip"} <= names:
        names.add("limits-per-ip")
    if flags.get("health_interval") == 0:
        names.add("health-check")
    return names


def _rewritten(line: Line, service: Service, general: Flags) -> list[str]:
    """The lines that replace one line of the template; variables come later."""
    text, flags = line.text, service.flags
    match "" if line.comment else line.name:
        case "tls-listener":
            return [text + _bind_options(service) + _own_tls(flags, general), *_trust(flags), *_own_times(flags, general)]
        case "backend":
            return [
                text.replace("core1", f"core{n}").replace("BACKEND_1", f"BACKEND_{n}")
                + ("" if _is_header_inside(flags) else _server_options(backend, flags))
                for n, backend in enumerate(flags.get("backend") or (None,), 1)
            ]
        case "proxy-header":
            return [_default_server(text, flags)]
        case "limits-per-ip" | "max-clients-per-ip" | "rate-per-ip":
            return [_limit(text, flags)]
    return [text]


def _default_server(text: str, flags: Flags) -> str:
    sends = {"v1": "send-proxy", "off": ""}.get(flags.get("proxy_protocol", "v2"))
    if sends is not None:
        text = re.sub(r"send-proxy-v2-ssl-cn proxy-v2-options \S+", sends, text)
    return text if flags.get("health_interval") != 0 else text.partition(" check ")[0]


def _is_header_inside(flags: Flags) -> bool:
    """Whether TLS backends get a PROXY header. HAProxy sends it before TLS, so TLS needs a section of its own."""
    return flags.get("proxy_protocol") != "off"


def _tls_sections(flags: Flags) -> str:
    """A section for each TLS backend, which encrypts the bytes of the service's section, its PROXY header first."""
    if not _is_header_inside(flags):
        return ""
    return "".join(
        "\n# HAProxy sends a PROXY header before TLS. Here the header of the section above is the first thing inside TLS.\n"
        f'listen core{number}_tls\n    no log\n    bind "abns@fumi-core{number}"\n'
        f"    server core{number} {_quoted(str(backend.plain))} {_TCP_USER_TIMEOUT}{_server_options(backend, flags)}\n"
        for number, backend in enumerate(flags.get("backend") or (), 1)
        if backend.tls
    )


def _server_options(backend: BackendAddress | None, flags: Flags) -> str:
    """The options of a server line for a backend over TLS; checks are made over TLS, too."""
    if backend is None or not backend.tls:
        return ""
    name, cert = _verified(backend, flags), flags.get("backend_cert")
    options = [f"ssl verify required ca-file {_quoted(flags.get('backend_ca') or '@system-ca')} verifyhost {_quoted(name)}"]
    if not _is_ip(name):
        options.append(f"sni str({_quoted(name)})" + ("" if _is_header_inside(flags) else f" check-sni {_quoted(name)}"))
    if cert:
        options.append(f"crt {_quoted(cert + '.both' if flags.get('backend_key') else cert)}")
    options.append("ssl-min-ver TLSv1.2")
    return "".join(f" {option}" for option in options)


def _verified(backend: BackendAddress, flags: Flags) -> str:
    """The name that the certificate of a backend must be for."""
    return str(flags.get("backend_name") or backend.host).removesuffix(".")


def _is_ip(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _limit(text: str, flags: Flags) -> str:
    if flags.get("accept_proxy"):
        # With the connection alone, the address is the load balancer's.
        text = text.replace("tcp-request connection", "tcp-request session")
    rate = flags.get("rate_per_ip")
    return text.replace("conn_rate(1m)", f"conn_rate({rate.seconds}s)") if rate else text


def _own_tls(flags: Flags, general: Flags) -> str:
    """The TLS settings of a service that differ from the global section."""
    options = [f'ssl-min-ver "TLSv{flags["min_tls"]}"'] if flags.get("min_tls") != general.get("min_tls") else []
    options += [f"ciphers {_quoted(flags['ciphers'])}"] if flags.get("ciphers") != general.get("ciphers") else []
    return "".join(f" {option}" for option in options)


def _own_times(flags: Flags, general: Flags) -> list[str]:
    """The times that differ from the defaults section."""
    lines = []
    if flags.get("idle_timeout") != general.get("idle_timeout"):
        lines += [f'    timeout {side} "{_milliseconds(flags["idle_timeout"])}"' for side in ("client", "server")]
    if flags.get("handshake_timeout") != general.get("handshake_timeout"):
        own = f'    timeout client-hs "{_milliseconds(flags["handshake_timeout"])}"'
        lines += [".if version_atleast(3.0)", own, ".endif"]
    return lines


def _bind_options(service: Service) -> str:
    flags = service.flags
    options = [f"crt {_quoted(label(cert))}" for cert, _ in service.pairs[1:]]
    if flags.get("client_ca"):
        options.append(f"ca-file {_quoted(flags['client_ca'])} verify {flags.get('client_cert') or 'optional'}")
    if flags.get("alpn"):
        options.append(f"alpn {_quoted(','.join(protocols(flags['alpn'])))}")
    if flags.get("accept_proxy"):
        options.append("accept-proxy")
    if flags.get("socket_mode") is not None:
        options.append(f"mode {flags['socket_mode']:03o}")
    return "".join(f" {option}" for option in options)


def _trust(flags: Flags) -> list[str]:
    """Rejects clients that --trusted-proxy does not list. On a Unix socket HAProxy finds no source address (``src -m found``)."""
    if not flags.get("accept_proxy"):
        return []
    trusted = flags.get("trusted_proxy") or THIS_HOST
    networks = " ".join(each for each in trusted if each != "unix")
    untrusted = ["{ src -m found }"] * ("unix" in trusted) + [f"!{{ src {networks} }}"] * bool(networks)
    return [f"    tcp-request connection reject if {' '.join(untrusted)}"]


def _values(service: Service) -> dict[str, str]:
    """The values of the variables, escaped for double quotes."""
    flags = service.flags
    values: dict[str, Any] = {"LISTEN": ",".join(map(_listener, service.listeners))}
    if service.pairs:
        values["CERT"] = label(service.pairs[0].cert)
    for number, address in enumerate(flags.get("backend") or (), 1):
        if address.tls and _is_header_inside(flags):
            values[f"BACKEND_{number}"] = f"abns@fumi-core{number}"
        else:
            values[f"BACKEND_{number}"] = _unix(address) if address.kind == "unix" else _host(address.plain, "127.0.0.1")
    for flag in ("balance", "min_tls", "ciphers", "max_clients", "max_clients_per_ip", "user"):
        values[flag.upper()] = flags.get(flag)
    for flag in TIMES:
        seconds = flags.get(flag)
        values[flag.upper()] = None if seconds is None else _milliseconds(seconds)
    if flags.get("rate_per_ip"):
        values["RATE_PER_IP"] = flags["rate_per_ip"].clients
    if flags.get("metrics"):
        values["METRICS"] = _listener(flags["metrics"])
    if flags.get("log_level"):
        values["LOG_LEVEL"] = {"error": "err"}.get(flags["log_level"], flags["log_level"])
    quoted = {name: _quoted(str(value))[1:-1] for name, value in values.items() if value is not None}
    if flags.get("user"):
        # It stays a variable: on another machine the user may have another group.
        quoted["GROUP"] = f"${{FUMI_GROUP-{_quoted(group_of(flags['user']))[1:-1]}}}"
    return quoted


def _milliseconds(seconds: float) -> str:
    return f"{max(1, math.ceil(min(seconds, LONGEST) * 1000))}ms"


def _listener(address: SocketAddress) -> str:
    if address.kind == "tcp" and not address.host:
        return f":{address.port},[::]:{address.port}"
    if address.kind != "unix":
        return str(address)
    if "," in address.path:
        raise SettingError(f"--emit haproxy: {address}: HAProxy takes a comma as the end of an address; use another path")
    if len(os.fsencode(address.path)) > _MAX_LISTENER_PATH:
        raise SettingError(
            f"--emit haproxy: {address}: HAProxy binds paths of at most {_MAX_LISTENER_PATH} bytes; use a shorter one"
        )
    return _unix(address)


def _unix(address: SocketAddress) -> str:
    if "$" in address.path:
        raise SettingError(f"--emit haproxy: {address}: HAProxy takes $ in a socket's path for a variable; use another path")
    return f"unix@{address.path}"


def _host(address: SocketAddress, default: str) -> str:
    return str(address) if address.host else f"{default}:{address.port}"


def _quoted(text: str) -> str:
    """In double quotes, where HAProxy gives a meaning to these three characters."""
    return '"' + re.sub(r'([\\"$])', r"\\\1", text) + '"'


class _Variables(string.Template):
    """The environment variables of an HAProxy file. Those without a value stay, and so does \\${…}, which is part of a value."""

    pattern = r"(?<!\\)\$(?:(?P<escaped>(?!))|(?P<named>(?!))|\{FUMI_(?P<braced>[A-Z0-9_]+)-[^}]*\}|(?P<invalid>(?!)))"  # type: ignore[assignment]
