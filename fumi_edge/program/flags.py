"""The flags of ``fumi-edge``."""

from __future__ import annotations

from typing import TypedDict

from fumi_core.runtime.addresses import SocketAddress
from fumi_edge.backends.addresses import BackendAddress
from fumi_edge.connection.limits import Rate
from fumi_edge.tls.pem import Source


class Flags(TypedDict):
    """All flags with their values, as click passes them. ``config`` is not among them: its values are in the others."""

    listen: tuple[SocketAddress, ...]
    starttls_listen: tuple[SocketAddress, ...]
    cert: tuple[Source, ...]
    key: tuple[Source, ...]
    cert_reload_interval: float
    backend: tuple[BackendAddress, ...]
    backend_ca: str | None
    backend_name: str | None
    backend_cert: str | None
    backend_key: str | None
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
