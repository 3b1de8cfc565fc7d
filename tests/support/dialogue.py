"""Plays the client of a dialogue written down line by line: what the client says, what the server must answer.

``C: text`` sends text and CRLF; ``C! text`` sends text as it stands, with Python's escapes, and ``C* n text`` sends such text n
times; ``S: text`` expects exactly this line, ``S? regex`` a line that matches, ``S* code`` a whole reply with this code; ``S.``
expects the connection to be closed with nothing more said; ``# …`` is a comment. Replies are read only where S lines stand, so
several C lines in a row are pipelined. Lines of other kinds are for those who know them.
"""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Callable, Sequence
from typing import BinaryIO

Other = Callable[[str, str], None]
"""Given a line that is neither the client's nor the server's: where it stands, and the line."""


def talk(sock: socket.socket, lines: Sequence[str], name: str, other: Other) -> None:
    """Say and expect all of it over a connection; ``name`` says in a failure which dialogue it was."""
    with sock.makefile("rb") as heard:
        waiting = b""
        for number, line in enumerate(lines, 1):
            kind, text, where = line[:2], line[3:], f"{name}:{number}"
            if kind in ("C:", "C!", "C*"):
                waiting += _said(kind, text)
            elif kind in ("S:", "S?", "S*", "S."):
                sock.sendall(waiting)
                waiting = b""
                _expect(kind, text, _reply(heard) if kind == "S*" else heard.readline(), where)
            elif line and not line.startswith("#"):
                other(where, line)
        if waiting:
            sock.sendall(waiting)


def unescaped(text: str) -> bytes:
    """The bytes that Python's escapes stand for."""
    value: bytes = ast.literal_eval('b"' + text.replace('"', r"\"") + '"')
    return value


def _said(kind: str, text: str) -> bytes:
    if kind == "C:":
        return text.encode() + b"\r\n"
    times, _, text = text.partition(" ") if kind == "C*" else ("1", "", text)
    return unescaped(text) * int(times)


def _reply(heard: BinaryIO) -> bytes:
    """The last line of a whole reply."""
    while (line := heard.readline())[3:4] == b"-":
        pass
    return line


def _expect(kind: str, text: str, got: bytes, where: str) -> None:
    if kind == "S.":
        assert got == b"", where
    elif kind == "S*":
        assert got.startswith(text.encode() + b" "), f"{where}: {got!r} is not a {text}"
    elif kind == "S:":
        assert got.decode() == text + "\r\n", where
    else:
        assert re.fullmatch(text + "\r\n", got.decode()), f"{where}: {got!r} is not {text}"
