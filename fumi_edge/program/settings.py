"""The flags of ``fumi-edge``, and the EdgeSettings that they make."""

from __future__ import annotations

from typing import TypedDict

from fumi_core.runtime.addresses import THIS_HOST, Networks, SocketAddress, parse_address
from fumi_core.runtime.listening import passed
from fumi_core.runtime.settings import SettingError, check_mode
from fumi_edge.backends.dialing import Destination, Remote, is_destination
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.connection.limits import ClientLimits, Rate
from fumi_edge.connection.policy import ListenerPolicy, ListenerSettings
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import CertificateError, Pair, Source
from fumi_edge.tls.policy import Policy
from fumi_edge.tls.sources import give_keys


class Flags(TypedDict):
    """All flags with their values, as click passes them. ``config`` is not among them: its values are in the others."""

    listen: tuple[SocketAddress, ...]
    starttls_listen: tuple[SocketAddress, ...]
    cert: tuple[Source, ...]
    key: tuple[Source, ...]
    cert_reload_interval: float
    backend: tuple[SocketAddress, ...]
    balance: str
    health_interval: float
    health_timeout: float
    proxy_protocol: str
    accept_proxy: bool
    trusted_proxy: tuple[str, ...]
    require_tls: bool
    hide_starttls: bool
    min_tls: str
    ciphers: str
    alpn: str | None
    client_ca: str | None
    client_cert: str | None
    metrics: SocketAddress | None
    handshake_timeout: float
    connect_timeout: float
    idle_timeout: float
    max_clients: int | None
    max_clients_per_ip: int | None
    rate_per_ip: Rate | None
    socket_mode: int | None
    workers: int
    user: str | None
    drain_timeout: float
    log_format: str
    log_level: str
    check: bool
    emit: str | None
    dev_mode: bool
    app: str | None


def edge_settings(flags: Flags, core: Destination | None = None) -> EdgeSettings:
    """The settings that the flags give. Certificates are not loaded yet. Raises SettingError.

    ``core`` is in this process, and takes the place of the backends.
    """
    tls = _tls_policy(flags)
    if not flags["cert"]:
        raise SettingError("no certificate: name one with --cert, or try --dev")
    settings = EdgeSettings(
        certificates=_certificates(flags),
        tls=tls,
        cert_reload_interval=flags["cert_reload_interval"],
        backends=_backends(flags) if core is None else BackendSettings((core,), health_interval=0),
        listeners=_listeners(flags),
        limits=ClientLimits(flags["max_clients"], flags["max_clients_per_ip"], flags["rate_per_ip"]),
        drain_timeout=flags["drain_timeout"],
        metrics=flags["metrics"],
        socket_mode=flags["socket_mode"],
    )
    check_mode(settings.socket_mode, [each.address for each in settings.listen_addresses])
    return settings


def load_certificates(settings: EdgeSettings) -> Certificates:
    """Load the certificates. Raises SettingError."""
    try:
        return Certificates(settings.certificates, settings.tls)
    except CertificateError as error:
        raise SettingError(str(error)) from None


def _tls_policy(flags: Flags) -> Policy:
    protocols = tuple(name.strip() for name in flags["alpn"].split(",")) if flags["alpn"] else ()
    if not all(name.isascii() and 0 < len(name) < 256 for name in protocols):
        raise SettingError("--alpn: the name of a protocol must have 1 to 255 ASCII characters")
    if flags["client_cert"] and not flags["client_ca"]:
        raise SettingError("--client-cert needs the CAs of client certificates: add --client-ca")
    try:
        return Policy(flags["min_tls"], protocols, flags["ciphers"], flags["client_ca"], flags["client_cert"] or "optional")
    except ValueError as error:
        raise SettingError(f"--ciphers: {error}") from None


def _certificates(flags: Flags) -> tuple[Pair, ...]:
    try:
        return tuple(give_keys(flags["cert"], flags["key"]))
    except CertificateError as error:
        raise SettingError(str(error)) from None


def _backends(flags: Flags) -> BackendSettings:
    if not flags["backend"]:
        raise SettingError("no backend: name one with --backend, for example --backend 127.0.0.1:2525")
    for address in flags["backend"]:
        if not is_destination(address):
            raise SettingError(f"{address} is not a backend: write HOST:PORT or unix:/path")
    return BackendSettings(
        destinations=tuple(Remote(address) for address in dict.fromkeys(flags["backend"])),
        proxy_protocol=flags["proxy_protocol"],
        balance=flags["balance"],
        connect_timeout=flags["connect_timeout"],
        health_interval=flags["health_interval"],
        health_timeout=flags["health_timeout"],
    )


def _listeners(flags: Flags) -> tuple[ListenerSettings, ...]:
    policy = _policy(flags)
    tls, starttls = flags["listen"], flags["starttls_listen"]
    if not tls and not starttls:
        tls = tuple(passed()) or (parse_address(":465"),)
    return (
        *(ListenerSettings(address, starttls=False, policy=policy) for address in tls),
        *(ListenerSettings(address, starttls=True, policy=policy) for address in starttls),
    )


def _policy(flags: Flags) -> ListenerPolicy:
    for flag, value in (("--require-tls", flags["require_tls"]), ("--hide-starttls", flags["hide_starttls"])):
        if value and not flags["starttls_listen"]:
            raise SettingError(f"{flag} applies to STARTTLS listeners only: add --starttls-listen, or remove it")
    if flags["trusted_proxy"] and not flags["accept_proxy"]:
        raise SettingError("--trusted-proxy has no effect without --accept-proxy: add it, or leave --trusted-proxy out")
    return ListenerPolicy(
        balancers=Networks(flags["trusted_proxy"] or THIS_HOST) if flags["accept_proxy"] else None,
        require_tls=flags["require_tls"],
        hide_starttls=flags["hide_starttls"],
        handshake_timeout=flags["handshake_timeout"],
        idle_timeout=flags["idle_timeout"],
    )
