"""The program fumi-edge: makes an Edge from the flags, and runs it until a signal stops it."""

from __future__ import annotations

import contextlib
import signal
from typing import Any, Unpack

import click

from fumi_core.runtime.config_file import config_option, listener_tables
from fumi_core.runtime.flag_groups import heading
from fumi_core.runtime.flag_types import (
    ADDRESS,
    COUNT,
    FILE,
    MODE,
    NAME,
    NETWORK,
    SECONDS,
    SECONDS_OR_ZERO,
    WORKERS,
    AddressType,
)
from fumi_core.runtime.lifecycle import STOP_SIGNALS, prepare
from fumi_core.runtime.privileges import PrivilegeError, find
from fumi_core.runtime.settings import Program, SettingError, given
from fumi_core.runtime.workers import run
from fumi_core.version import VERSION
from fumi_edge.backends.addresses import BackendAddress, parse_backend
from fumi_edge.backends.settings import BALANCES
from fumi_edge.connection.limits import Rate, parse_rate
from fumi_edge.edge import Edge
from fumi_edge.emit.configuration import PROGRAMS, configuration
from fumi_edge.program import dev
from fumi_edge.program.check import check
from fumi_edge.program.flag_source import FlagSource
from fumi_edge.program.flags import Flags
from fumi_edge.program.inner import Inner
from fumi_edge.program.listeners import LISTENER_KEYS, inherit
from fumi_edge.program.settings import edge_settings, load_certificates
from fumi_edge.program.work import EdgeWork
from fumi_edge.tls.policy import CIPHERS


class RateType(click.ParamType):  # type: ignore[type-arg]
    """N/s, N/m or N/h."""

    name = "n/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rate:
        try:
            return value if isinstance(value, Rate) else parse_rate(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class BackendType(AddressType):
    """ADDR, or tls:HOST:PORT."""

    name = "addr|tls:host:port"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "ADDR|tls:HOST:PORT"

    def parse(self, text: str) -> BackendAddress:
        return parse_backend(text)


@click.command(cls=Program, context_settings={"auto_envvar_prefix": "FUMI_EDGE"})
@click.argument("app", metavar="[MODULE:APP]", required=False)
@heading("Listeners and limits")
@click.option(
    "--listen",
    type=ADDRESS,
    multiple=True,
    show_default=":465 when no listener is named",
    help="Listens for implicit TLS. Repeatable.",
)
@click.option("--starttls-listen", type=ADDRESS, multiple=True, help="Listens for SMTP with STARTTLS. Repeatable.")
@click.option(
    "--accept-proxy",
    is_flag=True,
    help="Requires a PROXY header, v1 or v2, from a layer-4 load balancer at the start of every connection, before TLS.",
)
@click.option(
    "--trusted-proxy",
    type=NETWORK,
    multiple=True,
    show_default="this host",
    help="Addresses of load balancers; connections from others are closed. Repeatable.",
)
@click.option(
    "--max-clients",
    type=COUNT,
    show_default="no limit",
    help="Maximum number of concurrent connections, in all workers together.",
)
@click.option(
    "--max-clients-per-ip",
    type=COUNT,
    show_default="no limit",
    help="Maximum number of concurrent connections from one IPv4 address or IPv6 /64, in each worker.",
)
@click.option(
    "--rate-per-ip",
    type=RateType(),
    show_default="no limit",
    help="Maximum rate of new connections from one IPv4 address or IPv6 /64, in each worker: 10/s, 600/m, 1000/h.",
)
@heading("TLS")
@click.option(
    "--cert",
    type=FILE,
    metavar="FILE|DIR",
    multiple=True,
    help="Certificate: a PEM file with its chain, or a directory: *.pem, Let's Encrypt's, or Kubernetes' (tls.crt, tls.key)."
    " Repeatable.",
)
@click.option(
    "--key",
    type=FILE,
    metavar="FILE",
    multiple=True,
    help="Private key of a --cert file without one. Repeatable, in the order of --cert.",
)
@click.option(
    "--cert-reload-interval",
    type=SECONDS_OR_ZERO,
    default=10,
    help="Interval for checking certificate files. With 0 they are reloaded on SIGHUP only.",
)
@click.option("--min-tls", type=click.Choice(["1.2", "1.3"]), default="1.2", help="Oldest TLS version to accept.")
@click.option("--ciphers", metavar="LIST", default=CIPHERS, help="OpenSSL cipher list for TLS 1.2.")
@click.option("--alpn", metavar="LIST", help="Application protocols to negotiate, best first, separated by commas.")
@click.option(
    "--client-ca", type=FILE, metavar="FILE", help="Requests client certificates, signed by one of the CAs in this file."
)
@click.option(
    "--client-cert",
    type=click.Choice(["optional", "required"]),
    show_default="optional",
    help="Whether a client must have a certificate.",
)
@heading("SMTP before STARTTLS")
@click.option("--require-tls", is_flag=True, help="Clients of STARTTLS ports must upgrade before they send mail or passwords.")
@click.option("--hide-starttls", is_flag=True, help="Does not advertise STARTTLS, which still works.")
@heading("Backends")
@click.option(
    "--backend",
    type=BackendType(),
    multiple=True,
    help="Address of the SMTP server, or tls:HOST:PORT to reach it over TLS. Repeatable.",
)
@click.option(
    "--backend-ca",
    type=FILE,
    metavar="FILE",
    show_default="the system's",
    help="CAs that sign the certificates of TLS backends.",
)
@click.option(
    "--backend-name",
    type=NAME,
    metavar="NAME",
    show_default="HOST",
    help="Name or IP address that a TLS backend's certificate must be for.",
)
@click.option("--backend-cert", type=FILE, metavar="FILE", help="Certificate, with its chain, for TLS backends that request one.")
@click.option("--backend-key", type=FILE, metavar="FILE", help="Private key of --backend-cert, if it is not in the same file.")
@click.option(
    "--balance",
    type=click.Choice(BALANCES),
    default="leastconn",
    help="Choice among the backends that are up: fewest connections, round robin, or the first.",
)
@click.option(
    "--health-interval", type=SECONDS_OR_ZERO, default=5, help="Interval between health checks of a backend. 0 turns them off."
)
@click.option("--health-timeout", type=SECONDS, default=10, help="Time limit for the 220 banner in a health check.")
@click.option(
    "--proxy-protocol", type=click.Choice(["v2", "v1", "off"]), default="v2", help="PROXY protocol version sent to backends."
)
@heading("Timeouts")
@click.option("--handshake-timeout", type=SECONDS, default=10, help="Time limit for a TLS handshake.")
@click.option(
    "--connect-timeout", type=SECONDS, default=5, help="Time limit for connecting to a backend, its TLS handshake included."
)
@click.option(
    "--idle-timeout",
    type=SECONDS,
    default=900,
    help="Time after which a connection without traffic in either direction is closed.",
)
@click.option("--drain-timeout", type=SECONDS_OR_ZERO, default=30, help="Time limit for open connections after SIGTERM.")
@heading("Operation")
@config_option("edge", LISTENER_KEYS)
@click.option("--metrics", type=ADDRESS, help="Serves /metrics, /healthz, /readyz and, at /, the status page.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Log format.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="Lowest level that is logged."
)
@click.option("--socket-mode", type=MODE, show_default="by the umask", help="Permissions of Unix sockets, such as 0660.")
@click.option("--workers", type=WORKERS, default="1", help="Number of processes that share the work; auto is one per CPU.")
@click.option("--user", type=NAME, metavar="NAME", help="User to become after ports are bound and keys are read.")
@click.option(
    "--emit",
    type=click.Choice(PROGRAMS),
    help="Prints the equivalent configuration of that program, with a comment on the differences, and exits.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Checks certificates, addresses, file permissions for --user, and backends; reports problems and exits.",
)
@click.option(
    "--dev",
    "dev_mode",
    is_flag=True,
    help="Runs a trial with its own certificate and server, which delivers to ./maildir; /mail shows received mail.",
)
@click.version_option(VERSION, help="Prints the version and exits.")
def main(**flags: Unpack[Flags]) -> None:
    """Terminates TLS and STARTTLS in front of an SMTP server.

    With MODULE:APP, the app runs in this program, and there is no backend. With MODULE:MAKE(), the function MAKE returns the app.

    
      fumi-edge --cert cert.pem --key key.pem --backend 127.0.0.1:2525
      fumi-edge --starttls-listen :25 --cert /etc/letsencrypt --backend 127.0.0.1:2525
      fumi-edge --cert cert.pem --key key.pem myapp:app
      fumi-edge --dev

    Each setting can also be an environment variable, such as FUMI_EDGE_LISTEN, or a key in the file of --config. SIGHUP reloads
    settings and certificates. SIGTERM stops the edge when all connections have ended, after --drain-timeout at the latest.
    """
    ctx = click.get_current_context()
    tables = listener_tables(ctx)
    if flags["emit"]:
        click.echo(configuration(flags["emit"], ctx, [(each, inherit(flags, each.values)) for each in tables]), nl=False)
        return
    prepare(flags["log_format"], flags["log_level"])
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(dev.directory(flags, tables)) if flags["dev_mode"] else None
        inner = Inner(flags, given(ctx), tables) if flags["app"] else None
        if directory is not None:
            flags = dev.defaults(flags, given(ctx), directory)
        if inner is not None:
            flags = inner.defaults(flags, tables)
        core = None if inner is None else inner.core
        settings = edge_settings(flags, tables, core)
        certificates = load_certificates(settings)
        if flags["user"]:
            _find_user(flags["user"])
        if flags["check"]:
            if inner is not None:
                inner.check()
            check(settings, certificates, flags["user"], probing=directory is None and inner is None)
            return
        edge = Edge(settings, certificates, direct=core)
        if inner is not None:
            inner.count_in(edge.registry)
        if directory is not None:
            # Closing the terminal sends SIGHUP, which must stop the trial.
            run(EdgeWork(edge, dev.DevCore(edge, directory)), 1, stops=(*STOP_SIGNALS, signal.SIGHUP))
        else:
            if flags["workers"] > 1:
                for each in certificates.values():
                    each.share_ticket_keys()
            run(EdgeWork(edge, inner, flags["user"], FlagSource(ctx, inner)), flags["workers"])


def _find_user(name: str) -> None:
    try:
        find(name)
    except PrivilegeError as error:
        raise SettingError(f"--user: {error}") from None
