"""Makes EdgeSettings from the flags of ``fumi-edge`` and the listener tables of its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fumi_core.runtime.config_file import ListenerTable
from fumi_core.runtime.listening import clash
from fumi_core.runtime.settings import SettingError, check_mode
from fumi_edge.backends.dialing import Destination
from fumi_edge.program.flags import Flags
from fumi_edge.program.listeners import (
    backend_settings,
    certificate_settings,
    check_tls_backends,
    limits_of,
    listeners_of_flags,
    listeners_of_tables,
)
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.credentials import ClientSettings, Credentials
from fumi_edge.tls.pem import CertificateError
from fumi_edge.tls.policy import CertificateSettings


def edge_settings(
    flags: Flags,
    tables: Sequence[ListenerTable] = (),
    core: Destination | None = None,
    credentials: Mapping[ClientSettings, Credentials] | None = None,
) -> EdgeSettings:
    """The settings that the flags and the tables give. Certificates are not loaded yet. Raises SettingError.

    ``core`` is in this process, and takes the place of the backends. ``credentials`` are those for TLS backends that are loaded;
    others are loaded here.
    """
    loaded = dict(credentials or {})
    listeners = listeners_of_tables(flags, tables, loaded, core) if tables else ()
    # If the tables have all certificates and backends, the edge itself needs none.
    certificates = (listeners[0].certificates if listeners else None) or certificate_settings(flags)
    backends = (listeners[0].backends if listeners else None) or backend_settings(flags, loaded, core)
    if not tables and core is None:
        check_tls_backends(flags)
    settings = EdgeSettings(
        certificates=certificates,
        cert_reload_interval=flags["cert_reload_interval"],
        backends=backends,
        listeners=listeners or listeners_of_flags(flags),
        limits=limits_of(flags),
        drain_timeout=flags["drain_timeout"],
        metrics=flags["metrics"],
        socket_mode=flags["socket_mode"],
    )
    check_mode(settings.socket_mode, [each.address for each in settings.listen_addresses])
    if problem := clash(settings.listen_addresses):
        raise SettingError(problem)
    return settings


def load_certificates(
    settings: EdgeSettings, loaded: Mapping[CertificateSettings, Certificates] | None = None
) -> dict[CertificateSettings, Certificates]:
    """Load all certificates but those that are ``loaded``. Raises SettingError."""
    try:
        return {each: (loaded or {}).get(each) or Certificates(*each) for each in settings.all_certificates}
    except CertificateError as error:
        raise SettingError(str(error)) from None
