"""A mail filter's end of a connection, without a socket: the packets of its protocol, and the transport that they arrive on."""

from __future__ import annotations

import socket
import struct
from types import SimpleNamespace
from typing import Any

OFFERED = struct.pack("!III", 6, 0x1FF, 0x400)
"""What the filter answers to the offer of options: the version, the changes it may make, the steps it wants to answer."""


def packet(letter: bytes, data: bytes = b"") -> bytes:
    return struct.pack("!I", 1 + len(data)) + letter + data


def frames(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The packets, and what is left."""
    found = []
    while len(data) >= 5:
        length = struct.unpack("!I", data[:4])[0]
        if length == 0 or len(data) < 4 + length:
            break
        found.append((data[4:5], data[5 : 4 + length]))
        data = data[4 + length :]
    return found, data


class FilterTransport:
    """What a connection to a filter calls of asyncio's transport, besides ``write()``."""

    def __init__(self) -> None:
        self.closed = False

    def abort(self) -> None:
        self.closed = True

    close = abort

    def get_extra_info(self, name: str) -> Any:
        return SimpleNamespace(family=socket.AF_UNIX)

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...
