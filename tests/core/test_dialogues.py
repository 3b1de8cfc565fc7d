"""Plain-text dialogues: what the client says, what the server must answer. One file each, in folders by theme in dialogues/.

Their C and S lines are those of tests/support/dialogue.py.

Before the dialogue, ``@ option = value`` sets an option of Fumi, the value a Python literal, and ``H phase [whom]: deed`` adds
a handler: ``accept [text]``, ``reject code text``, ``refuse code text`` (LMTP, for that recipient alone) or ``fail`` (with an
exception). ``whom`` is an address, or the user's name, whose password or token is then what ``accept`` is followed by.

``A: close`` has the app closed; ``A: another client`` had one connect before. ``B! text`` is the text of a message that was
accepted, in order and with escapes, and ``B.`` says that none was: with either, these are all there were.
"""

from __future__ import annotations

import ast
import contextlib
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi, Next
from fumi_core.smtp import replies
from fumi_core.smtp.replies import Reply
from fumi_core.testing import RunningServer, running
from tests.support.dialogue import Other, talk, unescaped

FOLDER = Path(__file__).parent / "dialogues"
DIALOGUES = sorted(FOLDER.rglob("*.txt"))
HANDLER = re.compile(r"H (\w+)(?: (\S+))?: (\w+) ?(.*)")


@pytest.mark.parametrize("path", DIALOGUES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_the_server_answers_as_written(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    app = _app(lines)
    with running(app) as server:
        closing = threading.Thread(target=server.run, args=(app.close,))
        with contextlib.ExitStack() as clients:
            for _ in range(lines.count("A: another client")):
                clients.enter_context(_connect(server)).recv(1)
            sock = clients.enter_context(_connect(server))
            talk(sock, lines, path.name, _other(closing.start))
        if closing.ident is not None:
            closing.join()
        _expect_messages(server, lines)


def _connect(server: RunningServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=30)


def _app(lines: list[str]) -> Fumi:
    options: dict[str, Any] = {"auth_optional": True, "name": "mx.example"}
    options |= dict(_option(line) for line in lines if line.startswith("@"))
    app = Fumi(**options)
    for line in lines:
        if line.startswith("H "):
            _add_handler(app, line)
    return app


def _option(line: str) -> tuple[str, object]:
    name, _, value = line[1:].partition("=")
    return name.strip(), ast.literal_eval(value.strip())


def _add_handler(app: Fumi, line: str) -> None:
    found = HANDLER.fullmatch(line)
    assert found, line
    phase, whom, deed, text = found.groups()

    async def handler(ctx: Any, next: Next) -> None:
        if deed != "refuse" and whom is not None and whom != _whom(ctx):
            await next()
        elif deed == "fail":
            raise RuntimeError(line)
        elif deed == "accept":
            if phase != "auth" or ctx.credentials.access_token == text or ctx.credentials.validate_password(text):
                ctx.accept(text if phase == "data" else whom)
        else:
            code, _, message = text.partition(" ")
            if deed == "reject":
                ctx.reject(message, int(code))
            ctx.reject_recipient(whom, message, int(code))
            await next()

    getattr(app, f"on_{phase}")(handler)


def _whom(ctx: Any) -> str:
    """Whom a handler is asked about: the address, or the user."""
    name: str = ctx.credentials.username if hasattr(ctx, "credentials") else ctx.address.address
    return name


def _other(close: Callable[[], None]) -> Other:
    def other(where: str, line: str) -> None:
        if line == "A: close":
            close()
        else:
            known = line == "A: another client" or line[:2] in ("@ ", "H ", "B!", "B.")
            assert known, f"{where} is none of the lines there are"

    return other


def _expect_messages(server: RunningServer, lines: list[str]) -> None:
    if any(line[:2] in ("B!", "B.") for line in lines):
        assert [message.body for message in server.messages] == [unescaped(line[3:]) for line in lines if line[:2] == "B!"]


# What the dialogues leave out


def _expected_replies() -> set[str]:
    """Every reply that some dialogue expects word by word, its lines joined."""
    found = set[str]()
    for path in DIALOGUES:
        lines: list[str] = []
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("S:"):
                lines.append(line[3:])
                if line[6:7] != "-":
                    found.add("\r\n".join(lines) + "\r\n")
                    lines = []
    return found


CONSTANTS = {name: reply for name, reply in vars(replies).items() if isinstance(reply, Reply)}


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_reply_there_is_stands_in_a_dialogue(name: str) -> None:
    assert CONSTANTS[name].data.decode() in _expected_replies()


def test_there_are_dialogues() -> None:
    assert len(DIALOGUES) >= 130
