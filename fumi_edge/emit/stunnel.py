"""fumi-edge's flags as stunnel's configuration: stunnel/implicit-tls.conf with their values in it."""

from __future__ import annotations

import math
import os
import string
from collections.abc import Collection, Iterable, Mapping, Sequence

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.settings import SettingError
from fumi_edge.emit.notes import (
    LONGEST,
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
from fumi_edge.emit.template import Line, stunnel_template, without
from fumi_edge.tls.pem import label

_APPLIED = {
    *("listen", "starttls_listen", "cert", "key", "backend", "balance", "proxy_protocol", "client_ca", "client_cert"),
    *("min_tls", "ciphers", "connect_timeout", "idle_timeout", "handshake_timeout", "log_level", "user"),
}
"""The flags that have an equivalent in stunnel."""
_REASONS = {
    **dict.fromkeys(
        ("backend_ca", "backend_name", "backend_cert", "backend_key"), "a service of stunnel has TLS on one side only."
    ),
    "accept_proxy": "stunnel reads no PROXY headers, so it cannot run behind such a load balancer.",
    "trusted_proxy": "see --accept-proxy.",
    "alpn": "stunnel does not negotiate ALPN.",
    "max_clients": "the limit is half of ulimit -n.",
    "max_clients_per_ip": "stunnel has no limits by client address; use a packet filter.",
    "rate_per_ip": "stunnel has no limits by client address; use a packet filter.",
    "health_timeout": "see --health-interval.",
    "health_interval": "stunnel has no health checks; it finds that a core is down when it connects a client.",
    "metrics": "stunnel has no metrics.",
    "socket_mode": "the umask applies.",
    "drain_timeout": "SIGTERM ends all sessions at once.",
    "require_tls": "applies to STARTTLS listeners only.",
    "hide_starttls": "applies to STARTTLS listeners only.",
    "cert_reload_interval": "certificates are reloaded only on SIGHUP.",
    "log_format": "stunnel has its own format.",
}


def write(flags: Flags, given: Collection[str], services: Sequence[Service]) -> Emitted:
    """The notes and the configuration. Raises SettingError if stunnel supports none of the listeners."""
    unsupported = [address for each in services for address in _unsupported(each)]
    kept = supported(services, unsupported)
    if not kept:
        raise SettingError(
            f"--emit stunnel: {unsupported[0]} cannot be a listener of stunnel with a PROXY header; name HOST:PORT"
        )
    if over_tls := [str(each) for service in kept for each in service.flags.get("backend") or () if each.tls]:
        raise SettingError(
            f"--emit stunnel: {over_tls[0]}: a service of stunnel has TLS on one side only; name a backend without TLS, such as"
            " another service of stunnel, with client = yes"
        )
    general, template = stunnel_template()
    body = _set(general, _general_settings(flags))
    places = [(service, address) for service in kept for address in service.listeners]
    for number, (service, address) in enumerate(places, 1):
        own = {"accept": [f"accept = {_bare(address, '::')}"], **_service_settings(service)}
        name = f"[smtps-{number}]" if number > 1 else "[smtps]"
        body += [name, *_set(template, own), *_own_settings(service.flags, flags), *_client_certificates(service.flags), ""]
    notes = starttls(flags, "stunnel cannot combine STARTTLS (protocol = smtp) with a PROXY header; use fumi-edge.")
    notes += [f"--listen {address}: omitted." for address in unsupported]
    notes += dict.fromkeys(note for each in services for note in [*header_notes(each.flags), *_service_notes(each)])
    notes += not_applied(flags, given, _APPLIED, _REASONS)
    return notes, "\n".join(body).rstrip() + "\n"


def _is_proxying(flags: Flags) -> bool:
    return bool(flags.get("proxy_protocol", "v2") != "off")


def _unsupported(service: Service) -> list[SocketAddress]:
    return of_kind(service.listeners, "fd", *(["unix"] if _is_proxying(service.flags) else []))


def _service_notes(service: Service) -> list[str]:
    flags, notes = service.flags, []
    if _is_proxying(flags):
        notes.append(
            "The PROXY header is version 1: it has the client's address, but no TLS version, cipher, server name or certificate,"
            " and no id. Start the core with --assume-tls, and make sure that only stunnel can reach its port."
        )
    if len(flags.get("backend") or ()) > 1 and flags.get("balance", "leastconn") == "leastconn":
        notes.append("--balance leastconn: stunnel balances round robin.")
    return notes + [
        f"--cert {label(cert)}: omitted. Add a service for each name, with sni = smtps:NAME and cert = {label(cert)}."
        for cert, _ in service.pairs[1:]
    ]


def _set(lines: Iterable[Line], settings: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines, with those of some options replaced. An option that is replaced by no line is removed with its comment."""
    kept = without(lines, lambda option: settings.get(option) == [])
    return [new for line in kept for new in settings.get(line.name, [line.text])]


def _general_settings(flags: Flags) -> dict[str, list[str]]:
    """The options above the services, which apply to all of them."""
    values = {
        "debug": {"error": "err"}.get(flags.get("log_level", ""), flags.get("log_level")),
        "setuid": flags.get("user"),
        "setgid": group_of(flags["user"]) if flags.get("user") else None,
        **_common_settings(flags),
    }
    return {option: [f"{option} = {value}"] for option, value in values.items() if value}


def _common_settings(flags: Flags) -> dict[str, str | None]:
    """The options in which a service may differ from the others."""
    values = {
        "sslVersionMin": f"TLSv{flags['min_tls']}" if flags.get("min_tls") else None,
        "ciphers": flags.get("ciphers"),
    }
    for option, flag in (("busy", "handshake"), ("connect", "connect"), ("idle", "idle")):
        seconds = flags.get(f"{flag}_timeout")
        values[f"TIMEOUT{option}"] = None if seconds is None else str(math.ceil(min(seconds, LONGEST)))
    return values


def _own_settings(flags: Flags, general: Flags) -> list[str]:
    """The options that differ from those above the services."""
    common = _common_settings(general)
    return [f"{option} = {value}" for option, value in _common_settings(flags).items() if value != common[option]]


def _service_settings(service: Service) -> dict[str, list[str]]:
    flags, pairs = service.flags, service.pairs
    settings: dict[str, list[str]] = {}
    if backends := flags.get("backend"):
        targets = [_bare(address, "127.0.0.1") for address in backends]
        settings["connect"] = [f"connect = {target}" for target in targets]
        if len(targets) > 1:
            settings["connect"].append("failover = " + ("prio" if flags.get("balance") == "first" else "rr"))
    if pairs:
        cert, key = pairs[0]
        settings["cert"] = [f"cert = {_path(label(cert))}", *([f"key = {_path(label(key))}"] if key is not None else [])]
    if flags.get("proxy_protocol") == "off":
        settings["protocol"] = []
    return settings


def _client_certificates(flags: Flags) -> list[str]:
    if not flags.get("client_ca"):
        return []
    required = "yes" if flags.get("client_cert") == "required" else "no"
    return [f"CAfile = {_path(flags['client_ca'])}", "verifyChain = yes", f"requireCert = {required}"]


def _path(text: str) -> str:
    """The path as a value. stunnel leaves out white space at both ends of a value, and has no quotes. Raises SettingError."""
    if text != text.strip(string.whitespace):
        raise SettingError(
            f"--emit stunnel: {text!r} begins or ends with white space, which stunnel leaves out; use another path"
        )
    return text


def _bare(address: SocketAddress, default: str) -> str:
    """stunnel uses no brackets: the port follows the last colon. A path is what begins with a slash."""
    if address.kind == "unix":
        return _path(os.path.abspath(address.path))
    return f"{address.host or default}:{address.port}"
