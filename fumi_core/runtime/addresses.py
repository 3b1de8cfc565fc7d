"""Addresses as an operator writes them, and networks of addresses.

``HOST:PORT``, ``[V6]:PORT``, ``:PORT`` (every interface), ``unix:/path``, ``fd:N`` (a socket inherited from the parent),
``fd:NAME`` (the sockets that systemd passes with that name).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Literal

_FD_NAME = re.compile(r"[!-9;-~]{1,255}")

_MAPPED = b"\0" * 10 + b"\xff\xff"  # the first 96 bits of an IPv4-mapped address

THIS_HOST = ("127.0.0.0/8", "::1/128", "unix")
"""The networks of peers on this host, for ``Networks``."""


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """An address to listen on or connect to. ``host`` is empty for every interface; ``name`` is systemd's for ``fd``."""

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1
    name: str = ""

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.name or self.fd}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, forms: str = "HOST:PORT, [V6]:PORT, :PORT, unix:/path or fd:N") -> SocketAddress:
    """Parse ADDR. The message of the ValueError says what is wrong, and names these ``forms``."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        if not rest or "\0" in rest:
            raise ValueError(f"{text!r} has no path: write unix:/path/to/socket")
        if len(os.fsencode(rest)) > 107:
            raise ValueError(f"{text!r} is too long: the path of a Unix socket has at most 107 bytes")
        return SocketAddress("unix", path=rest)
    if scheme == "fd":
        if not rest.isdecimal():
            if not _FD_NAME.fullmatch(rest):
                raise ValueError(f"{text!r} is not a descriptor: write fd:3, or fd:NAME for a socket that systemd passes")
            return SocketAddress("fd", name=rest)
        if int(rest) > 2**31 - 1:
            raise ValueError(f"{text!r} is not a descriptor: the number is too large")
        return SocketAddress("fd", fd=int(rest))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address: write {forms}")
    if host.startswith("[") and host.endswith("]"):
        if not (host := host[1:-1]):
            raise ValueError(f"{text!r} has no address in its brackets: for every interface write :{port}")
    elif ":" in host:
        raise ValueError(f"{text!r} is ambiguous: write an IPv6 address in brackets, as in [::1]:{port}")
    if "\0" in host:
        raise ValueError(f"{text!r}: {host!r} is not a host name")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"{text!r}: {host!r} is not a host name") from None
    return SocketAddress("tcp", host=host, port=int(port))


def peer_of(name: Any) -> tuple[str, int]:
    """(host, port) from a getpeername() result: ("unix", 0) for a Unix socket, IPv4 for an IPv4-mapped IPv6 address."""
    if not isinstance(name, tuple):
        return "unix", 0
    return unmapped(name[0].partition("%")[0]), name[1]


def unmapped(host: str) -> str:
    """The IPv4 address of an IPv4-mapped IPv6 address (RFC 4291 §2.5.5.2), in any spelling; other hosts unchanged."""
    if ":" not in host:
        return host
    try:
        packed = socket.inet_pton(socket.AF_INET6, host)
    except (OSError, ValueError):
        return host
    return socket.inet_ntop(socket.AF_INET, packed[12:]) if packed[:12] == _MAPPED else host


def block_of(host: str, *, ipv4: int, ipv6: int) -> str:
    """The CIDR block of this many bits that contains a host, for counting clients by block; ``unix`` for every Unix socket."""
    host = unmapped(host)
    try:
        bits = ipv4 if ip_address(host).version == 4 else ipv6
        return str(ip_network((host, bits), strict=False))
    except ValueError:
        return "unix"


class Networks:
    """A set of CIDR blocks, and ``unix`` for every peer on a Unix socket; ``host in networks`` takes microseconds.

    IPv4-mapped IPv6 addresses and blocks are treated as the IPv4 addresses and blocks that they map.
    """

    __slots__ = ("_blocks", "_unix")

    def __init__(self, texts: Iterable[str]) -> None:
        """Raises ValueError for a string that is not a network, an address or ``unix``."""
        self._unix = False
        self._blocks: list[tuple[int, int, int]] = []
        for text in texts:
            if text == "unix":
                self._unix = True
                continue
            try:
                network = ip_network(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is not a network: write 192.0.2.0/24, 2001:db8::/32 or unix ({error})") from None
            if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped is not None:
                network = ip_network((unmapped(str(network.network_address)), network.prefixlen - 96))
            self._blocks.append((network.version, int(network.network_address), int(network.netmask)))

    def __contains__(self, host: str) -> bool:
        if host == "unix":
            return self._unix
        host = unmapped(host)
        version, family = (6, socket.AF_INET6) if ":" in host else (4, socket.AF_INET)
        try:
            number = int.from_bytes(socket.inet_pton(family, host), "big")
        except (OSError, ValueError):
            return False  # not an address: a Unix socket's path
        return any(kind == version and number & mask == network for kind, network, mask in self._blocks)
