"""Addresses of backends as an operator writes them: ADDR, or ``tls:HOST:PORT`` for a backend that is reached over TLS."""

from __future__ import annotations

from dataclasses import dataclass

from fumi_core.runtime.addresses import SocketAddress, parse_address

_TLS = "tls:"
_FORMS = "HOST:PORT, [V6]:PORT, :PORT, unix:/path or tls:HOST:PORT"


@dataclass(frozen=True, slots=True)
class BackendAddress(SocketAddress):
    """An address to connect to, and whether to use TLS there."""

    tls: bool = False

    def __str__(self) -> str:
        return f"{_TLS}{self.plain}" if self.tls else str(self.plain)

    @property
    def plain(self) -> SocketAddress:
        """The address alone."""
        return SocketAddress(self.kind, self.host, self.port, self.path, self.fd, self.name)


def parse_backend(text: str) -> BackendAddress:
    """Parse the address of a backend. The message of the ValueError says what is wrong."""
    tls = text.startswith(_TLS)
    address = parse_address(text.removeprefix(_TLS), "tls:HOST:PORT" if tls else _FORMS)
    if tls and (address.kind != "tcp" or not address.host):
        raise ValueError(f"{text!r} names no host, so no certificate can be verified: write tls:HOST:PORT")
    return BackendAddress(address.kind, address.host, address.port, address.path, address.fd, address.name, tls)


def is_destination(address: SocketAddress) -> bool:
    """Whether it can be connected to: neither a descriptor nor port 0."""
    return address.kind == "unix" or (address.kind == "tcp" and bool(address.port))
