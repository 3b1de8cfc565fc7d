"""A name server that knows some IPv4 addresses, and of all other names that they have nothing (RFC 1035).

``python -m tests.engines.name_server ADDRESS NAME=ADDRESS ...`` serves on port 53 of ADDRESS until it is killed.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.hosts import Host
from tests.support.starter import ROOT

_ANSWER, _A_IN, _NAME = 0x8580, struct.pack(">2H", 1, 1), b"\xc0\x0c"


@contextlib.contextmanager
def name_server(host: Host, address: str, known: Mapping[str, str], log: Path) -> Iterator[None]:
    """One on this host, at one of its addresses."""
    words = [f"{name}={value}" for name, value in known.items()]
    process = host.start(sys.executable, "-m", "tests.engines.name_server", address, *words, log=log, cwd=ROOT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answer(query: bytes, addresses: dict[bytes, str]) -> bytes:
    """The answer to one query; the keys are questions."""
    question = query[12 : query.index(b"\0", 12) + 5]
    address = addresses.get(question.lower())
    record = _NAME + _A_IN + struct.pack(">IH", 60, 4) + socket.inet_aton(address) if address else b""
    return query[:2] + struct.pack(">5H", _ANSWER, 1, bool(record), 0, 0) + question + record


def question(name: str) -> bytes:
    """The question for a name's IPv4 address."""
    return b"".join(bytes([len(label)]) + label for label in name.encode().split(b".")) + b"\0" + _A_IN


def main() -> None:
    listen, *known = sys.argv[1:]
    addresses = {question(name): address for name, _, address in (each.partition("=") for each in known)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((listen, 53))
        while True:
            query, client = sock.recvfrom(4096)
            sock.sendto(answer(query, addresses), client)


if __name__ == "__main__":
    main()
