"""``fumi_edge.Fumi``: the app of fumi_core with TLS, all in one process.

It is the edge and the core in one process, not a second TLS implementation. The edge accepts, applies the limits and does the
handshake; then the core serves the client on its TLS socket, with the facts that a PROXY header would carry. A client that begins
in plaintext is served through a socket pair and a PROXY header until it upgrades.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Unpack

from fumi_core import app as core
from fumi_core.runtime.addresses import Networks
from fumi_core.runtime.scoreboard import count_of_one_process
from fumi_core.server.client_facts import ClientFacts, Origin, address_of
from fumi_core.server.listeners import Server
from fumi_core.server.setup import DialogueSetup
from fumi_core.server.transport import Transport, TransportOwner
from fumi_core.smtp.options import OptionArguments, override
from fumi_edge.backends.dialing import Opening
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.backends.tls import BackendTLS
from fumi_edge.connection.direct import DirectClient
from fumi_edge.connection.limits import ClientLimits
from fumi_edge.connection.policy import ListenerPolicy
from fumi_edge.edge import Edge
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import Source
from fumi_edge.tls.policy import CertificateSettings, Policy

EXTRA_IDLE_SECONDS = 30.0
"""Seconds by which a tunnel's idle timeout exceeds ``socket_timeout``, so that the core sends its 421 first."""


class Fumi(core.Fumi):
    """An SMTP server with TLS: implicit with ``secure``, otherwise by STARTTLS; without ``cert`` the same as fumi_core's.

    ``key``, ``cert`` and ``ca`` are PEM, as text or bytes, or the path of a PEM file; ``cert`` may hold the key too. With
    ``ca``, a client certificate of one of these CAs is requested, but not required. All other options are those of
    ``fumi_core.Fumi``. A client over ``max_clients`` is closed without a reply on a TLS port, and ``require_tls`` and
    ``hide_starttls`` apply to the STARTTLS of this server.
    """

    def __init__(
        self,
        *,
        secure: bool = False,
        key: Source | None = None,
        cert: Source | None = None,
        ca: Source | None = None,
        **options: Unpack[OptionArguments],
    ) -> None:
        """Raises TypeError and ValueError for an option, as ``fumi_core.Fumi`` does, and TypeError without a certificate that is
        needed. Raises CertificateError (``fumi_edge.tls.pem``) for one that cannot be used.
        """
        super().__init__(**options)
        if cert is None:
            for name, value in (("secure", secure), ("key", key), ("ca", ca)):
                if value:
                    raise TypeError(f"{name} needs a certificate: add cert=, and key= if cert does not hold the key")
        self._secure = secure
        self._certificates = None if cert is None else Certificates([(cert, key)], Policy(client_ca=ca))
        self._edge: Edge | None = None

    def update_secure_context(self, *, cert: Source, key: Source | None = None) -> None:
        """Use another certificate for handshakes from now on; existing connections are unaffected.

        Raises CertificateError, and then the old certificate stays in service; TypeError if the app was made without ``cert``.
        """
        if self._certificates is None:
            raise TypeError("there is no certificate to update: the app was made without cert=")
        self._certificates.update(cert, key)

    def _dialogue_setup(self) -> DialogueSetup:
        if self._certificates is None:
            return super()._dialogue_setup()
        return _behind_edge(super()._dialogue_setup())

    def _listen(self, server: Server, sock: socket.socket) -> None:
        if self._certificates is None:
            super()._listen(server, sock)
            return
        if self._edge is None:
            self._edge = self._start_edge(self._certificates, server)
        options = self.options
        policy = ListenerPolicy(
            balancers=Networks(options.trusted_proxies) if options.proxy_protocol == "required" else None,
            hide_starttls=options.hide_starttls,
            idle_timeout=options.socket_timeout + EXTRA_IDLE_SECONDS,
        )
        self._edge.listen(sock, str(sock.getsockname()), starttls=not self._secure, policy=policy)

    def _start_edge(self, certificates: Certificates, server: Server) -> Edge:
        core = LocalCore(starttls=not self._secure)
        core.attach(server)
        own = CertificateSettings(tuple(certificates.sources), certificates.policy)
        edge = Edge(
            EdgeSettings(
                certificates=own,
                cert_reload_interval=0,
                backends=BackendSettings((core,), health_interval=0),
                limits=ClientLimits(self.options.max_clients),
                drain_timeout=self.options.close_timeout,
            ),
            {own: certificates},
            direct=core,
        )
        edge.begin(self.connection_count)
        return edge

    def _sockets(self, server: Server) -> list[socket.socket]:
        return super()._sockets(server) if self._edge is None else [each.sock for each in self._edge.listeners]

    async def _close(self, server: Server) -> None:
        edge, self._edge = self._edge, None
        if edge is None:
            await super()._close(server)
        else:
            # The core ends the dialogues. The edge stops accepting, and ends the tunnels that are left.
            await asyncio.gather(edge.close(), super()._close(server))


class InnerApp(core.Fumi):
    """An app whose clients are accepted by an edge in the same process."""

    def _dialogue_setup(self) -> DialogueSetup:
        return _behind_edge(super()._dialogue_setup())


def _behind_edge(setup: DialogueSetup) -> DialogueSetup:
    """The edge passes each client's facts, or sends a header. It applies the limit, and reads a load balancer's header."""
    setup.options = override(setup.options, {"proxy_protocol": "required", "max_clients": None})
    setup.trusted = Networks((*setup.options.trusted_proxies, "unix"))
    return setup


class LocalCore:
    """The core in this process: it serves clients over TLS directly, and is the backend of those that begin in plaintext."""

    name = "core"
    tls: BackendTLS | None = None

    def __init__(self, starttls: bool) -> None:
        """``starttls`` tells whether clients may begin in plaintext. Call ``attach()`` before the first client."""
        self.descriptors = 2 if starttls else 0
        self._server: Server

    def attach(self, server: Server) -> None:
        """Serve the clients with this server, which must not count them: the edge does."""
        server.connection_count = count_of_one_process()
        self._server = server

    @property
    def buffer(self) -> memoryview:
        return self._server.buffer

    def serve(self, client: DirectClient, transport: Callable[[TransportOwner], Transport]) -> Callable[[], None]:
        origin = Origin.UNNAMED_CLIENT if client.unnamed else Origin.CLIENT
        facts = ClientFacts(
            address_of(client.source),
            address_of(client.destination),
            secure=True,
            tls=client.tls,
            proxy_address=None if client.balancer is None else address_of(client.balancer)[0],
            id=client.id,
            origin=Origin.HEALTH_CHECK if client.check else origin,
            greeted=client.upgraded,
        )
        return self._server.serve(facts, transport)

    async def connect(self, loop: asyncio.AbstractEventLoop, timeout: float, opening: Opening) -> socket.socket:
        """Return one end of a socket pair; the core serves the other. It never waits. Raises OSError."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        ours.send(opening if isinstance(opening, bytes) else opening("", ""))
        self._server.admit(theirs, "", "")
        return ours

    def avoid(self, sock: socket.socket) -> bool:
        return False

    def copy_for_other_loop(self) -> LocalCore:
        return self
