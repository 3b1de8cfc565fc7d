"""A name server that knows one host's IPv4 address, and of all other names that they have nothing (RFC 1035).

``python -m tests.engines.name_server ADDRESS HOST HOST_ADDRESS`` serves on port 53 of ADDRESS until it is killed.
"""

from __future__ import annotations

import socket
import struct
import sys

_ANSWER, _A_IN, _NAME = 0x8580, struct.pack(">2H", 1, 1), b"\xc0\x0c"


def answer(query: bytes, host: str, address: str) -> bytes:
    """The answer to one query."""
    name_end = query.index(b"\0", 12) + 1
    question = query[12 : name_end + 4]
    wanted = b"".join(bytes([len(label)]) + label for label in host.encode().split(b".")) + b"\0" + _A_IN
    record = b""
    if question.lower() == wanted:
        record = _NAME + _A_IN + struct.pack(">IH", 60, 4) + socket.inet_aton(address)
    return query[:2] + struct.pack(">5H", _ANSWER, 1, bool(record), 0, 0) + question + record


def main() -> None:
    listen, host, address = sys.argv[1:]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((listen, 53))
        while True:
            query, client = sock.recvfrom(4096)
            sock.sendto(answer(query, host, address), client)


if __name__ == "__main__":
    main()
