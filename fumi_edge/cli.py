"""The program fumi-edge: makes an Edge from the flags, and runs it until a signal stops it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from fumi_core.runtime.addresses import THIS_HOST, Networks, parse_address, passed
from fumi_core.runtime.flag_groups import heading
from fumi_core.runtime.lifecycle import STOPS, hold_reloads, ignore_user_signals, raise_descriptor_limit
from fumi_core.runtime.logs import configure
from fumi_core.runtime.privileges import PrivilegeError, find
from fumi_core.runtime.settings import (
    ADDRESS,
    CONFIGURATION_OK,
    COUNT,
    MODE,
    NAME,
    NETWORK,
    SECONDS,
    SECONDS_OR_NONE,
    WORKERS,
    Program,
    SettingError,
    check_mode,
    config_option,
)
from fumi_core.runtime.workers import run
from fumi_core.version import VERSION
from fumi_edge.backends.choice import BALANCES, Backend
from fumi_edge.backends.dialing import Remote, is_destination
from fumi_edge.backends.health import Manner, dependency_problems, offering_starttls
from fumi_edge.connection.limits import Rate, parse_rate
from fumi_edge.edge import Edge
from fumi_edge.emit.configuration import PROGRAMS, configuration
from fumi_edge.program import dev
from fumi_edge.program.check import ListenAddress, check_listen, clash, unreadable
from fumi_edge.program.work import EdgeWork
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import CertificateError
from fumi_edge.tls.policy import CIPHERS, Policy
from fumi_edge.tls.sources import give_keys


class RateType(click.ParamType):  # type: ignore[type-arg]
    """N/s, N/m or N/h."""

    name = "n/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rate:
        try:
            return value if isinstance(value, Rate) else parse_rate(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(cls=Program, context_settings={"auto_envvar_prefix": "FUMI_EDGE"})
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
    show_default="loopback and unix",
    help="Addresses of load balancers; connections from others are closed. Repeatable.",
)
@click.option("--max-clients", type=COUNT, help="Maximum number of concurrent connections.")
@click.option(
    "--max-clients-per-ip",
    type=COUNT,
    help="Maximum number of concurrent connections from one IPv4 address or IPv6 /64, in each worker.",
)
@click.option(
    "--rate-per-ip",
    type=RateType(),
    help="Maximum rate of new connections from one IPv4 address or IPv6 /64, in each worker: 10/s, 600/m, 1000/h.",
)
@heading("TLS")
@click.option(
    "--cert",
    type=NAME,
    metavar="FILE|DIR",
    multiple=True,
    help="Certificate: a PEM file with its chain, or a directory: *.pem, Let's Encrypt's, or Kubernetes' (tls.crt, tls.key)."
    " Repeatable.",
)
@click.option(
    "--key",
    type=NAME,
    metavar="FILE",
    multiple=True,
    help="Private key of a --cert file without one. Repeatable, in the order of --cert.",
)
@click.option(
    "--cert-reload-interval",
    type=SECONDS_OR_NONE,
    default=10,
    help="Interval for checking certificate files. With 0 they are reloaded on SIGHUP only.",
)
@click.option("--min-tls", type=click.Choice(["1.2", "1.3"]), default="1.2", help="Oldest TLS version to accept.")
@click.option("--ciphers", metavar="LIST", default=CIPHERS, help="OpenSSL cipher list for TLS 1.2.")
@click.option("--alpn", metavar="LIST", help="Application protocols to negotiate, best first, separated by commas.")
@click.option(
    "--client-ca", type=NAME, metavar="FILE", help="Requests client certificates, signed by one of the CAs in this file."
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
@click.option("--backend", type=ADDRESS, multiple=True, help="Address of the SMTP server. Repeatable.")
@click.option(
    "--balance",
    type=click.Choice(BALANCES),
    default="leastconn",
    help="Choice among the backends that are up: fewest connections, each in turn, or the first.",
)
@click.option(
    "--health-interval", type=SECONDS_OR_NONE, default=5, help="Interval between health checks of a backend. 0 turns them off."
)
@click.option("--health-timeout", type=SECONDS, default=10, help="Time limit for the 220 banner in a health check.")
@click.option(
    "--proxy-protocol", type=click.Choice(["v2", "v1", "off"]), default="v2", help="PROXY protocol version sent to backends."
)
@heading("Timeouts")
@click.option("--handshake-timeout", type=SECONDS, default=10, help="Time limit for a TLS handshake.")
@click.option("--connect-timeout", type=SECONDS, default=5, help="Time limit for connecting to a backend.")
@click.option(
    "--idle-timeout",
    type=SECONDS,
    default=900,
    help="Time after which a connection without traffic in either direction is closed.",
)
@click.option("--drain-timeout", type=SECONDS_OR_NONE, default=30, help="Time that connections get to end after SIGTERM.")
@heading("Operation")
@config_option("edge")
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
    "--dev", "dev_mode", is_flag=True, help="Runs a trial with its own certificate and server, which delivers to ./maildir."
)
@click.version_option(VERSION, help="Prints the version and exits.")
def main(
    log_format: str, log_level: str, workers: int, user: str | None, check: bool, emit: str | None, dev_mode: bool, **flags: Any
) -> None:
    """Terminate TLS and STARTTLS in front of an SMTP server."""
    if emit:
        click.echo(configuration(emit, click.get_current_context()), nl=False)
        return
    configure(log_format, log_level)
    raise_descriptor_limit()
    ignore_user_signals()
    hold_reloads()
    with contextlib.ExitStack() as stack:
        if dev_mode:
            if flags["cert"] or flags["key"] or flags["backend"]:
                raise SettingError("--dev brings its own certificate and server: leave out --cert, --key and --backend")
            if workers != 1 or user:
                raise SettingError("--dev is one process, and yours: leave out --workers and --user")
            if flags["accept_proxy"] or flags["hide_starttls"]:
                raise SettingError(
                    "--dev prints commands for clients that come themselves and look for STARTTLS: leave out"
                    " --accept-proxy and --hide-starttls"
                )
            directory = stack.enter_context(dev.directory())
            flags |= dev.defaults(flags, directory)
        edge = _edge(flags)
        if user:
            _find_user(user)
        if check:
            _check(edge, () if dev_mode else edge.backends, flags, user)
            return
        if dev_mode:
            # Closing the terminal sends SIGHUP, which must stop the trial.
            run(EdgeWork(edge, dev.DevCore(edge, directory)), 1, stops=(*STOPS, signal.SIGHUP))
        else:
            if workers > 1:
                edge.certificates.share_ticket_keys()
            run(EdgeWork(edge, user=user), workers)


def _find_user(name: str) -> None:
    try:
        find(name)
    except PrivilegeError as error:
        raise SettingError(f"--user: {error}") from None


def _edge(flags: dict[str, Any]) -> Edge:
    cert, key = flags.pop("cert"), flags.pop("key")
    policy = _policy(flags)
    if not cert:
        raise SettingError("no certificate: name one with --cert, or try --dev")
    if not flags["backend"]:
        raise SettingError("no backend: name one with --backend, for example --backend 127.0.0.1:2525")
    for address in flags["backend"]:
        if not is_destination(address):
            raise SettingError(f"{address} is no backend: write HOST:PORT or unix:/path")
    accepts, trusted = flags.pop("accept_proxy"), flags.pop("trusted_proxy")
    if trusted and not accepts:
        raise SettingError("--trusted-proxy says who may send a PROXY header: add --accept-proxy, or leave it out")
    try:
        certificates = Certificates(give_keys(cert, key), policy)
    except CertificateError as error:
        raise SettingError(str(error)) from None
    if not flags["listen"] and not flags["starttls_listen"]:
        flags["listen"] = passed() or [parse_address(":465")]
    for name in ("require_tls", "hide_starttls"):
        if flags[name] and not flags["starttls_listen"]:
            raise SettingError(f"--{name.replace('_', '-')} is for STARTTLS listeners: add --starttls-listen, or leave it out")
    check_mode(flags["socket_mode"], [each.address for each in _places(flags)])
    if problem := clash(_places(flags)):
        raise SettingError(problem)
    balancers = Networks(trusted or THIS_HOST) if accepts else None
    backends = [Remote(address) for address in dict.fromkeys(flags.pop("backend"))]
    return Edge(certificates=certificates, backends=backends, balancers=balancers, **flags)


def _policy(flags: dict[str, Any]) -> Policy:
    alpn, client_ca, client_cert = flags.pop("alpn"), flags.pop("client_ca"), flags.pop("client_cert")
    protocols = tuple(name.strip() for name in alpn.split(",")) if alpn else ()
    if not all(name.isascii() and 0 < len(name) < 256 for name in protocols):
        raise SettingError("--alpn: every protocol's name has 1 to 255 ASCII characters")
    if client_cert and not client_ca:
        raise SettingError("--client-cert: name the authorities of client certificates with --client-ca")
    try:
        return Policy(flags.pop("min_tls"), protocols, flags.pop("ciphers"), client_ca, client_cert or "optional")
    except ValueError as error:
        raise SettingError(f"--ciphers: {error}") from None


def _places(flags: dict[str, Any]) -> list[ListenAddress]:
    """All addresses to listen on."""
    places = [ListenAddress("--listen", address) for address in flags["listen"]]
    places += [ListenAddress("--starttls-listen", address) for address in flags["starttls_listen"]]
    return places + ([ListenAddress("--metrics", flags["metrics"])] if flags["metrics"] else [])


def _warnings(backends: Sequence[Backend], flags: dict[str, Any], manner: Manner) -> Iterator[str]:
    """Yield warnings about settings that work but may have unexpected effects."""
    if manner.proxy_protocol != "off":
        for place in _places(flags):
            if place.address.kind == "unix" and place.flag != "--metrics":
                yield f"{place}: Postfix, Exim and Dovecot reject the PROXY headers of its clients, which have no IP address"
        return
    offers = offering_starttls([backend.destination for backend in backends], manner)
    for backend in (backend for backend, offer in zip(backends, offers, strict=True) if offer):
        yield f"backend {backend.name} offers STARTTLS, inside TLS too, where RFC 3207 forbids it: turn it off there"


def _check(edge: Edge, backends: Sequence[Backend], flags: dict[str, Any], user: str | None) -> None:
    """Print the result of ``--check``. Raises SettingError with all problems in one line."""
    now = time.time()
    problems = [*edge.certificates.validity_problems(now), *edge.certificates.authority_problems(now)]
    if problem := edge.certificates.startup_problem():
        problems.append(problem)
    listen_check = check_listen(_places(flags))
    problems += listen_check.problems
    if user:
        problems += [f"--user {user} cannot read {path}" for path in unreadable(user, edge.certificates.files())]
    manner = Manner(flags["proxy_protocol"], flags["connect_timeout"], flags["health_timeout"])
    found = dependency_problems([backend.destination for backend in backends], manner)
    problems += [f"backend {each.name}: {problem}" for each, problem in zip(backends, found, strict=True) if problem]
    for warning in _warnings(backends, flags, manner):
        click.echo(f"warning: {warning}")
    for address in listen_check.taken:
        click.echo(f"{address} is already in use (by a running fumi-edge or another program)")
    if problems:
        raise SettingError("; ".join(problems))
    click.echo(CONFIGURATION_OK)
