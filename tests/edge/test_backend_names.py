"""A backend given by a name, in the whole program: the system's resolver, and an /etc/hosts of the test's own."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edge.backends import smtp
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.edge.replies import READY
from tests.support.peer import Peer
from tests.support.ports import free_port
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a program an /etc/hosts of its own")


class Cores:
    """SMTP servers with one port and an address each, whose name is core.test."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.quit = Counter[str]()
        """How many sessions over TLS each address has served to their end, of those that began since this was set."""
        self.silent: set[str] = set()
        """The addresses that close every connection before the banner."""
        self._hosts = directory / "hosts"
        self._listening: dict[str, socket.socket] = {}

    def prefix(self) -> list[str | Path]:
        """The command that runs a program where the name has these addresses."""
        return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', self._hosts]

    def are_at(self, *addresses: str) -> None:
        """Servers run at these addresses, and at no others, and the name has them."""
        for gone in self._listening.keys() - set(addresses):
            with contextlib.suppress(OSError):
                self._listening[gone].shutdown(socket.SHUT_RDWR)
            self._listening.pop(gone).close()
        for address in addresses:
            if address not in self._listening:
                self._listening[address] = server = socket.create_server((address, self.port), backlog=64)
                threading.Thread(target=self._accept, args=(server, address), daemon=True).start()
        self.are_named(*addresses)

    def are_named(self, *addresses: str) -> None:
        self._hosts.write_text("".join(f"{address} core.test\n" for address in addresses))

    def _accept(self, server: socket.socket, address: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(Peer(server.accept()[0]), address), daemon=True).start()

    def _serve(self, peer: Peer, address: str) -> None:
        quit = self.quit
        with contextlib.suppress(OSError, EOFError):
            if address not in self.silent:
                peer.take_header()
                smtp(peer)
                if peer.header.tls is not None:
                    quit[address] += 1
        peer.close()

    def close(self) -> None:
        self.are_at()


@pytest.fixture
def cores(tmp_path: Path) -> Iterator[Cores]:
    made = Cores(tmp_path)
    yield made
    made.close()


def served(clients: Clients, program: Program, upgrade: bool) -> bool:
    """Whether a client has its session, from the banner to the end."""
    if upgrade:
        client = clients.plain(program.starttls_port)
        if not client.reply()[-1].startswith(b"220 ") or client.ask(b"STARTTLS\r\n") != READY:
            return False
        client = clients.upgrade(client)
    else:
        client = clients.tls(program.tls_port)
        if not client.line().startswith(b"220 "):
            return False
    said = client.ask(b"QUIT\r\n")
    client.close()
    return said == [b"221 2.0.0 bye\r\n"]


@pytest.mark.parametrize("upgrade", [False, True], ids=["tls", "starttls"])
def test_clients_are_served_while_addresses_of_the_name_fail_and_where_it_moves_to(
    cores: Cores, edge: StartEdge, clients: Clients, upgrade: bool
) -> None:
    cores.are_at("127.0.0.2", "127.0.0.3", "127.0.0.4")
    program = edge("--health-interval", "0.2", backend=f"core.test:{cores.port}", prefix=cores.prefix())

    def all_served(*addresses: str) -> None:
        cores.quit = Counter()
        assert all(served(clients, program, upgrade) for _ in range(40))
        until(lambda: cores.quit.keys() == set(addresses), f"sessions at {addresses} alone")

    all_served("127.0.0.2", "127.0.0.3", "127.0.0.4")
    cores.silent.add("127.0.0.3")
    all_served("127.0.0.2", "127.0.0.4")
    cores.are_at("127.0.0.3", "127.0.0.4")  # the name is not resolved again while an address works
    all_served("127.0.0.4")
    assert program.fetch("/readyz")[0] == 200
    assert program.events("backend down") == []
    cores.are_at("127.0.0.5", "127.0.0.6")
    until(lambda: served(clients, program, upgrade), "a session where the name has moved to")
    all_served("127.0.0.5", "127.0.0.6")
