"""A client that sends EHLO and nothing else, until its connection ends.

    python -m tests.hosts.idle HOST PORT

writes the reply to stdout, and "ended" at the end.
"""

from __future__ import annotations

import contextlib
import socket
import sys

if __name__ == "__main__":
    with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as sock:
        sock.sendall(b"EHLO idle.example.net\r\n")
        with contextlib.suppress(OSError):
            while data := sock.recv(4096):
                print(data.decode(), end="", flush=True)
    print("ended")
