"""The addresses to listen on, and which of them exclude each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from fumi_core.runtime.addresses import SocketAddress


class ListenAddress(NamedTuple):
    """An address to listen on, and its flag."""

    flag: str
    address: SocketAddress

    def __str__(self) -> str:
        return f"{self.flag} {self.address}"


def clash(places: Iterable[ListenAddress]) -> str | None:
    """A message about the first two addresses that cannot both be listened on, or None."""
    for one, other in itertools.combinations(places, 2):
        if one.address == other.address and not _any_port(one.address):
            if one.flag == other.flag:
                return f"{one} is given twice"
            return f"{one} and {other}: one address cannot serve both"
        for whole, part in ((one, other), (other, one)):
            if _is_part(part.address, whole.address):
                return f"{whole} is every address of this machine, and {part} one of them"
    return None


def _any_port(address: SocketAddress) -> bool:
    return address.kind == "tcp" and not address.port


def _is_part(part: SocketAddress, whole: SocketAddress) -> bool:
    both_tcp = part.kind == whole.kind == "tcp"
    return both_tcp and part.port == whole.port != 0 and bool(part.host) and not whole.host
