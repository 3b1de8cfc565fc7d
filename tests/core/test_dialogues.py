"""Plain-text dialogues: what the client says, what the server must answer. One file each in dialogues/.

``C: text`` sends text and CRLF; ``C! text`` sends text as it stands, with Python's escapes; ``S: text`` expects exactly this
line, ``S? regex`` a line that matches, ``S* code`` a whole reply with this code; ``S.`` expects the connection to be closed
with nothing more said; ``# …`` is a comment. ``@ option = value`` lines at the top set options of Fumi, values as Python
literals. Replies are read only where S lines stand, so several C lines in a row are pipelined.
"""

from __future__ import annotations

import ast
import re
import socket
from pathlib import Path

import pytest

from fumi_core import Fumi
from fumi_core.testing import running

DIALOGUES = sorted((Path(__file__).parent / "dialogues").glob("*.txt"))


@pytest.mark.parametrize("path", DIALOGUES, ids=lambda path: path.stem)
def test_the_server_answers_as_written(path: Path) -> None:
    lines = path.read_text().splitlines()
    options = dict(_option(line) for line in lines if line.startswith("@"))
    app = Fumi(**{"auth_optional": True, "name": "mx.example", **options})
    with (
        running(app) as server,
        socket.create_connection((server.host, server.port), timeout=10) as sock,
        sock.makefile("rb") as replies,
    ):
        waiting = b""
        for number, line in enumerate(lines, 1):
            kind, text = line[:2], line[3:]
            if kind in ("C:", "C!"):
                waiting += text.encode() + b"\r\n" if kind == "C:" else ast.literal_eval(f'b"{text}"')
            elif kind in ("S:", "S?", "S*", "S."):
                sock.sendall(waiting)
                waiting = b""
                got = replies.readline()
                while kind == "S*" and got[3:4] == b"-":
                    got = replies.readline()
                _expect(kind, text, got, f"{path.name}:{number}")


def _option(line: str) -> tuple[str, object]:
    name, _, value = line[1:].partition("=")
    return name.strip(), ast.literal_eval(value.strip())


def _expect(kind: str, text: str, got: bytes, where: str) -> None:
    if kind == "S.":
        assert got == b"", where
    elif kind == "S*":
        assert got.startswith(text.encode() + b" "), f"{where}: {got!r} is not a {text}"
    elif kind == "S:":
        assert got.decode() == text + "\r\n", where
    else:
        assert re.fullmatch(text + "\r\n", got.decode()), f"{where}: {got!r} is not {text}"


def test_there_are_dialogues() -> None:
    assert len(DIALOGUES) > 40
