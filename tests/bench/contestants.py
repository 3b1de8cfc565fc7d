"""How each server is started for the rows. None but Fumi logs: what Fumi writes by default counts against it.

Every round starts its own process: a figure that depends on how a process happened to lay out its memory then shows in the spread
of the rounds, instead of hiding in the one process that was measured.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from .environment import INSTALLED, ROOT, Site, aiosmtpd_python, postfix_environment, postfix_program
from .processes import Server, free_port, running

Start = Callable[[Site], AbstractContextManager[Server]]

PEERS = Path(__file__).parent / "peers"
PROGRAMS = Path(sys.executable).parent
# The tree that this file is in is measured, whatever is installed.
FUMI = {"PYTHONPATH": str(ROOT)}
LISTEN_QUEUE = "1024"


@dataclass(frozen=True)
class Contestant:
    """A name for the table, and how to start it."""

    name: str
    start: Start


def fumi_core(*arguments: str) -> Start:
    """`fumi-core` without a PROXY header, with these further arguments."""

    @contextlib.contextmanager
    def start(site: Site) -> Iterator[Server]:
        port = free_port()
        argv = [str(PROGRAMS / "fumi-core"), "--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off", *arguments]
        with running(argv, port, site.log("fumi-core"), FUMI) as pid:
            yield Server(port, (pid,))

    return start


@contextlib.contextmanager
def fumi_core_with_milter(site: Site) -> Iterator[Server]:
    """`fumi-core` that discards what a mail filter has accepted. Nobody counts the filter's CPU."""
    port = free_port()
    core = fumi_core("--deliver", "discard:", "--milter", f"127.0.0.1:{port}")
    argv = [sys.executable, "-m", "tests.bench.milter", str(port)]
    with running(argv, port, site.log("milter"), FUMI), core(site) as server:
        yield server


@contextlib.contextmanager
def all_in_one(site: Site) -> Iterator[Server]:
    """`fumi-edge` with an app: TLS and SMTP in one process."""
    port = free_port()
    cert, key = certificate(site, tls=True)
    argv = [
        str(PROGRAMS / "fumi-edge"),
        "--cert",
        cert,
        "--key",
        key,
        "--listen",
        f"127.0.0.1:{port}",
        "tests.bench.all_in_one:app",
    ]
    with running(argv, port, site.log("all-in-one"), FUMI) as pid:
        yield Server(port, (pid,))


def aiosmtpd(tls: bool = False) -> Start:
    """aiosmtpd with its own discarding handler."""

    @contextlib.contextmanager
    def start(site: Site) -> Iterator[Server]:
        port = free_port()
        argv = [aiosmtpd_python(), str(PEERS / "aiosmtpd_sink.py"), str(port), *certificate(site, tls)]
        with running(argv, port, site.log("aiosmtpd")) as pid:
            yield Server(port, (pid,))

    return start


def smtp_server(tls: bool = False) -> Start:
    """smtp-server on Node."""

    @contextlib.contextmanager
    def start(site: Site) -> Iterator[Server]:
        port = free_port()
        environment = {"NODE_PATH": str(INSTALLED / "node/node_modules")}
        argv = ["node", str(PEERS / "smtp_server_sink.js"), str(port), *certificate(site, tls)]
        with running(argv, port, site.log("smtp-server"), environment) as pid:
            yield Server(port, (pid,))

    return start


def certificate(site: Site, tls: bool) -> list[str]:
    """The certificate and key that a server with TLS is given; nothing for one without."""
    return [str(site.certificate), str(site.key)] if tls else []


@contextlib.contextmanager
def smtp_sink(site: Site) -> Iterator[Server]:
    """Postfix's smtp-sink, which as root insists on a user to become."""
    port = free_port()
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    argv = [*postfix_program("smtp-sink"), *user, f"127.0.0.1:{port}", LISTEN_QUEUE]
    with running(argv, port, site.log("smtp-sink"), postfix_environment()) as pid:
        yield Server(port, (pid,))


@contextlib.contextmanager
def backend(site: Site, talk: str, tls: bool = False) -> Iterator[int]:
    """`backend.py` in one of its three ways; gives its port, for nobody counts its CPU."""
    port = free_port()
    argv = [sys.executable, "-m", "tests.bench.backend", str(port), talk, *certificate(site, tls)]
    with running(argv, port, site.log(f"backend-{port}"), FUMI):
        yield port


def fumi_edge(talk: str, tls_backend: bool = False) -> Start:
    """`fumi-edge` in front of the backend, which it may reach over TLS."""

    @contextlib.contextmanager
    def start(site: Site) -> Iterator[Server]:
        with backend(site, talk, tls_backend) as behind:
            flags = ["--backend-ca", str(site.certificate)] if tls_backend else []
            address = f"tls:localhost:{behind}" if tls_backend else f"127.0.0.1:{behind}"
            with edge_in_front_of(site, address, *flags) as server:
                yield server

    return start


@contextlib.contextmanager
def edge_in_front_of(site: Site, backend: str, *flags: str) -> Iterator[Server]:
    """`fumi-edge` in front of an address."""
    port = free_port()
    files = ["--cert", str(site.certificate), "--key", str(site.key), *flags]
    # The peers do not check their backend either.
    ports = ["--backend", backend, "--listen", f"127.0.0.1:{port}", "--health-interval", "0"]
    argv = [str(PROGRAMS / "fumi-edge"), *files, *ports]
    with running(argv, port, site.log("fumi-edge"), FUMI) as pid:
        yield Server(port, (pid,))


@contextlib.contextmanager
def fumi_both(site: Site) -> Iterator[Server]:
    """`fumi-edge` in front of `fumi-core` as they are set up on one machine, by a Unix socket; the CPU of both counted."""
    port, between = free_port(), f"unix:{site.directory / 'core.sock'}"
    argv = [str(PROGRAMS / "fumi-core"), "--listen", f"127.0.0.1:{port}", "--listen", between, "--deliver", "discard:"]
    with running(argv, port, site.log("fumi-core"), FUMI) as core, edge_in_front_of(site, between) as edge:
        yield Server(edge.port, (core, *edge.pids))


HAPROXY = """
global
    nbthread 1
defaults
    mode tcp
    timeout connect 5s
    timeout client 5m
    timeout server 5m
listen smtps
    bind 127.0.0.1:{port} ssl crt {site.certificate_and_key}
    server core 127.0.0.1:{behind} send-proxy-v2-ssl-cn {ssl}
"""
HAPROXY_TLS_BACKEND = "ssl verify required ca-file {site.certificate} verifyhost localhost sni str(localhost)"


def haproxy(talk: str, tls_backend: bool = False) -> Start:
    """HAProxy on one thread in front of the backend, which it may reach over TLS."""

    @contextlib.contextmanager
    def start(site: Site) -> Iterator[Server]:
        port, configuration = free_port(), site.directory / "haproxy.cfg"
        ssl = HAPROXY_TLS_BACKEND.format(site=site) if tls_backend else ""
        with backend(site, talk, tls_backend) as behind:
            configuration.write_text(HAPROXY.format(port=port, behind=behind, site=site, ssl=ssl))
            with running(["haproxy", "-db", "-f", str(configuration)], port, site.log("haproxy")) as pid:
                yield Server(port, (pid,))

    return start


STUNNEL = """
foreground = yes
pid =
debug = err
[smtps]
accept = 127.0.0.1:{port}
connect = 127.0.0.1:{behind}
protocol = proxy
cert = {site.certificate}
key = {site.key}
"""


def stunnel(talk: str) -> Start:
    """stunnel in front of the backend; its header is v1, which cannot tell of TLS."""

    @contextlib.contextmanager
    def start(site: Site) -> Iterator[Server]:
        port, configuration = free_port(), site.directory / "stunnel.conf"
        with backend(site, talk) as behind:
            configuration.write_text(STUNNEL.format(port=port, behind=behind, site=site))
            with running(["stunnel4", str(configuration)], port, site.log("stunnel")) as pid:
                yield Server(port, (pid,))

    return start
