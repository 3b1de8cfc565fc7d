"""The listeners: those of the flags, or those of ``[[edge.listener]]`` tables, each with settings of its own.

A key in a table is for its listener alone; what is missing there is inherited from the flags, the environment and ``[edge]``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import click

from fumi_core.runtime.addresses import THIS_HOST, Networks, parse_address
from fumi_core.runtime.config_file import ListenerKeys, ListenerTable
from fumi_core.runtime.listening import passed
from fumi_core.runtime.settings import SettingError
from fumi_edge.backends.addresses import BackendAddress, is_destination
from fumi_edge.backends.dialing import Destination, Remote
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.backends.tls import BackendTLS
from fumi_edge.connection.limits import ClientLimits
from fumi_edge.connection.policy import ListenerPolicy, ListenerSettings
from fumi_edge.program.flags import Flags
from fumi_edge.tls.credentials import ClientSettings, Credentials
from fumi_edge.tls.pem import CertificateError, Pair
from fumi_edge.tls.policy import CertificateSettings, Policy, protocols
from fumi_edge.tls.sources import give_keys

LISTENER_KEYS = ListenerKeys(
    flags=(
        *("cert", "key", "client-ca", "client-cert", "min-tls", "ciphers", "alpn"),
        *("require-tls", "hide-starttls", "accept-proxy", "trusted-proxy"),
        *("backend", "backend-ca", "backend-name", "backend-cert", "backend-key", "balance", "proxy-protocol"),
        *("idle-timeout", "handshake-timeout", "max-clients-per-ip", "rate-per-ip"),
    ),
    own=(click.Option(["--mode"], type=click.Choice(["tls", "starttls"])),),
)
"""What a table may contain beside its address."""
_LIMITS = ("max_clients_per_ip", "rate_per_ip")
_OF_TLS_BACKENDS = ("backend_ca", "backend_name", "backend_cert", "backend_key")
LoadedCredentials = dict[ClientSettings, Credentials]
"""The credentials that are loaded. Others are loaded and added when they are needed."""


def listeners_of_flags(flags: Flags) -> tuple[ListenerSettings, ...]:
    """Those of --listen and --starttls-listen, which have the same settings. Raises SettingError."""
    for flag, value in (("--require-tls", flags["require_tls"]), ("--hide-starttls", flags["hide_starttls"])):
        if value and not flags["starttls_listen"]:
            raise SettingError(f"{flag} applies to STARTTLS listeners only: add --starttls-listen, or remove it")
    if flags["trusted_proxy"] and not flags["accept_proxy"]:
        raise SettingError("--trusted-proxy has no effect without --accept-proxy: add it, or remove --trusted-proxy")
    policy = _policy(flags)
    tls, starttls = flags["listen"], flags["starttls_listen"]
    if not tls and not starttls:
        tls = tuple(passed()) or (parse_address(":465"),)
    return (
        *(ListenerSettings(address, starttls=False, policy=policy, setting="--listen") for address in tls),
        *(ListenerSettings(address, starttls=True, policy=policy, setting="--starttls-listen") for address in starttls),
    )


def listeners_of_tables(
    flags: Flags, tables: Sequence[ListenerTable], credentials: LoadedCredentials, core: Destination | None = None
) -> tuple[ListenerSettings, ...]:
    """Those of the tables. ``core`` takes the place of all backends. Raises SettingError."""
    for flag, addresses in (("--listen", flags["listen"]), ("--starttls-listen", flags["starttls_listen"])):
        if addresses:
            raise SettingError(f"{flag} and {tables[0].section} exclude each other: name all listeners in one of these ways")
    listeners = tuple(_listener(flags, table, credentials, core) for table in tables)
    _check_inherited(flags, tables, listeners)
    _check_same_backends(listeners)
    return listeners


def _listener(flags: Flags, table: ListenerTable, credentials: LoadedCredentials, core: Destination | None) -> ListenerSettings:
    own = table.values
    with _in_table(table):
        if "mode" not in own:
            raise SettingError('no mode: add mode = "tls" or mode = "starttls"')
        starttls = own["mode"] == "starttls"
        merged = inherit(flags, own)
        _check_table(own, merged, starttls)
        return ListenerSettings(
            table.address,
            starttls,
            _policy(merged),
            certificates=certificate_settings(merged),
            backends=backend_settings(merged, credentials, core),
            limits=limits_of(merged) if any(name in own for name in _LIMITS) else None,
            setting=table.section,
        )


def inherit(flags: Flags, own: Mapping[str, Any]) -> Flags:
    """The flags with the values of a table. Certificates and keys are inherited together, since each key belongs to one."""
    pair: dict[str, Any] = {"cert": (), "key": ()} if "cert" in own or "key" in own else {}
    if "backend_cert" in own or "backend_key" in own:
        pair |= {"backend_cert": None, "backend_key": None}
    return cast(Flags, {**flags, **pair, **own})


def _check_table(own: Mapping[str, Any], merged: Flags, starttls: bool) -> None:
    """Raises SettingError for keys that have no effect in this table."""
    for name in ("require_tls", "hide_starttls"):
        if own.get(name) and not starttls:
            raise SettingError(
                f'{name.replace("_", "-")} applies to STARTTLS listeners only: remove it, or write mode = "starttls"'
            )
    if "key" in own and "cert" not in own:
        raise SettingError("key without cert: name both")
    if unused := _without_tls_backend(own, merged["backend"]):
        raise SettingError(f"{unused} is for backends over TLS: write a backend as tls:HOST:PORT, or remove it")
    if own.get("trusted_proxy") and not merged["accept_proxy"]:
        raise SettingError("trusted-proxy has no effect without accept-proxy: add accept-proxy = true, or remove it")


def _check_inherited(flags: Flags, tables: Sequence[ListenerTable], listeners: Sequence[ListenerSettings]) -> None:
    """Raises SettingError for flags that have no effect for any of the listeners."""
    for flag, value in (("require-tls", flags["require_tls"]), ("hide-starttls", flags["hide_starttls"])):
        if value and not any(each.starttls for each in listeners):
            raise SettingError(f"{flag} applies to STARTTLS listeners only, and no {tables[0].section} is one")
    backends = [each for listener in listeners if listener.backends for each in listener.backends.destinations]
    if all(each.tls is None for each in backends) and (unused := _without_tls_backend(flags, ())):
        raise SettingError(f"{unused} is for backends over TLS, and no {tables[0].section} has one")
    if flags["trusted_proxy"] and all(each.policy.balancers is None for each in listeners):
        raise SettingError(f"trusted-proxy has no effect: no {tables[0].section} has accept-proxy = true")


def _without_tls_backend(flags: Mapping[str, Any], backends: Sequence[BackendAddress]) -> str | None:
    """The first key of TLS backends that the flags have although no backend is one; or None."""
    if any(each.tls for each in backends):
        return None
    return next((name.replace("_", "-") for name in _OF_TLS_BACKENDS if flags.get(name)), None)


def _check_same_backends(listeners: Sequence[ListenerSettings]) -> None:
    """Raises SettingError if listeners have different PROXY headers or TLS settings for one backend."""
    seen: dict[str, tuple[str, Destination]] = {}
    for listener in listeners:
        assert listener.backends is not None
        version = listener.backends.proxy_protocol
        for each in listener.backends.destinations:
            before, same = seen.setdefault(each.name, (version, each))
            if before != version:
                raise SettingError(
                    f"backend {each.name}: proxy-protocol is {before!r} for one listener and {version!r} for another: use one, or"
                    " another port of the backend"
                )
            if same != each:
                raise SettingError(
                    f"backend {each.name}: backend-ca, backend-name, backend-cert and backend-key must be the same for all its"
                    " listeners: use the same, or another port of the backend"
                )


def limits_of(flags: Flags) -> ClientLimits:
    return ClientLimits(flags["max_clients"], flags["max_clients_per_ip"], flags["rate_per_ip"])


def _policy(flags: Flags) -> ListenerPolicy:
    return ListenerPolicy(
        balancers=Networks(flags["trusted_proxy"] or THIS_HOST) if flags["accept_proxy"] else None,
        require_tls=flags["require_tls"],
        hide_starttls=flags["hide_starttls"],
        handshake_timeout=flags["handshake_timeout"],
        idle_timeout=flags["idle_timeout"],
    )


@contextlib.contextmanager
def _in_table(table: ListenerTable) -> Iterator[None]:
    """Errors begin with the table."""
    try:
        yield
    except SettingError as error:
        raise SettingError(f"{table.section} {table.address}: {error.message}") from None


def certificate_settings(flags: Flags) -> CertificateSettings:
    """The certificates, which are not loaded yet, and the policy under which they are served. Raises SettingError."""
    policy = _tls_policy(flags)
    if not flags["cert"]:
        raise SettingError("no certificate: name one with --cert, or try --dev")
    try:
        return CertificateSettings(tuple(give_keys(flags["cert"], flags["key"])), policy)
    except CertificateError as error:
        raise SettingError(str(error)) from None


def _tls_policy(flags: Flags) -> Policy:
    try:
        alpn = protocols(flags["alpn"] or "")
    except ValueError as error:
        raise SettingError(f"--alpn: {error}") from None
    if flags["client_cert"] and not flags["client_ca"]:
        raise SettingError("--client-cert needs the CAs of client certificates: add --client-ca")
    try:
        return Policy(flags["min_tls"], alpn, flags["ciphers"], flags["client_ca"], flags["client_cert"] or "optional")
    except ValueError as error:
        raise SettingError(f"--ciphers: {error}") from None


def backend_settings(flags: Flags, credentials: LoadedCredentials, core: Destination | None = None) -> BackendSettings:
    """The backends, or ``core``, which is in this process. Raises SettingError."""
    if core is not None:
        return BackendSettings((core,), health_interval=0)
    if not flags["backend"]:
        raise SettingError("no backend: name one with --backend, for example --backend 127.0.0.1:2525")
    for address in flags["backend"]:
        if not is_destination(address):
            raise SettingError(f"{address} is not a backend: write HOST:PORT, tls:HOST:PORT or unix:/path")
    return BackendSettings(
        destinations=tuple(_destination(address, flags, credentials) for address in dict.fromkeys(flags["backend"])),
        proxy_protocol=flags["proxy_protocol"],
        balance=flags["balance"],
        connect_timeout=flags["connect_timeout"],
        health_interval=flags["health_interval"],
        health_timeout=flags["health_timeout"],
    )


def check_tls_backends(flags: Flags) -> None:
    """Raises SettingError if flags are for TLS backends, and no backend of the flags is one."""
    if unused := _without_tls_backend(flags, flags["backend"]):
        raise SettingError(f"--{unused} is for backends over TLS: write --backend tls:HOST:PORT, or remove it")


def _destination(address: BackendAddress, flags: Flags, credentials: LoadedCredentials) -> Remote:
    if not address.tls:
        return Remote(address)
    if flags["backend_key"] and not flags["backend_cert"]:
        raise SettingError("--backend-key without --backend-cert: name both")
    pair = Pair(flags["backend_cert"], flags["backend_key"]) if flags["backend_cert"] else None
    settings = ClientSettings(flags["backend_ca"], pair)
    try:
        if settings not in credentials:
            credentials[settings] = Credentials(settings)
        return Remote(address, BackendTLS(credentials[settings], flags["backend_name"] or address.host))
    except CertificateError as error:
        raise SettingError(str(error)) from None
    except ValueError as error:
        raise SettingError(f"{'--backend-name' if flags['backend_name'] else address}: {error}") from None
