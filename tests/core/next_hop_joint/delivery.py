"""Transactions with several recipients, and an LMTP server that answers for each."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fumi_core.testing import RunningServer
from tests.core.client import Client
from tests.core.scripted_hop import StartHop

MIXED = b"451-4.2.0 Delivered to "

TEXT = "Subject: hi\r\nMessage-ID: <1@b.example>\r\n\r\nhi\r\n"

OTHER = TEXT.replace("<1@", "<2@")


StoreAnswer = str | None | Callable[[], str | None]
"""A reply without its recipient, None to close the connection, or a function that returns one of these."""


class Store:
    """An LMTP server that delivers: ``copies`` counts by recipient and text, ``answers`` says what others get, by recipient."""

    def __init__(self, scripted_hop: StartHop, **answers: StoreAnswer) -> None:
        self.answers = answers
        self.copies: Counter[tuple[str, str]] = Counter()
        self.hop = scripted_hop(dot=self._deliver, MAIL=self._sender, RCPT=self._recipient)
        self.address = self.hop.address
        self.unknown: set[str] = set()
        self._recipients: list[str] = []

    def _sender(self, line: bytes) -> bytes:
        self._recipients = []
        return b"250 2.1.0 Ok\r\n"

    def _recipient(self, line: bytes) -> bytes:
        (name,) = re.findall(r"<(\w+)@", line.decode())
        if name in self.unknown:
            return b"550 5.1.1 <%b> User unknown\r\n" % name.encode()
        self._recipients.append(name)
        return b"250 2.1.5 Ok\r\n"

    def _deliver(self, text: bytes) -> Iterator[bytes | None]:
        for name in self._recipients:
            answer = self.answers.get(name, "250 2.0.0 Saved")
            answer = answer() if callable(answer) else answer
            if answer is None:
                yield None
                return
            if answer.startswith("250"):
                self.copies[name, text.decode().partition("Subject")[2]] += 1
            code, status, words = answer.split(" ", 2)
            yield f"{code} {status} <{name}> {words}\r\n".encode()

    def copies_of(self, text: str) -> dict[str, int]:
        return {name: count for (name, found), count in self.copies.items() if found == text.partition("Subject")[2]}


class MakeStore(Protocol):
    """Starts an LMTP server with these answers."""

    def __call__(self, **answers: StoreAnswer) -> Store: ...


class Front(Protocol):
    """Starts a core that delivers to an LMTP server and has a state directory, each its own by default."""

    def __call__(self, hop: Store, state: Path | None = ..., **options: Any) -> RunningServer: ...


def envelope(client: Client, *names: str, parameters: str = " SIZE=100") -> list[bytes]:
    """The replies to RCPT."""
    assert client.say("EHLO client.example").startswith(b"250")
    assert client.say(f"MAIL FROM:<a@b.example>{parameters}").startswith(b"250")
    return [client.say(f"RCPT TO:<{name}@d.example>") for name in names]


def send(client: Client, *names: str, text: str = TEXT, parameters: str = " SIZE=100") -> bytes:
    """A transaction whose recipients are all accepted: the reply to the message."""
    for reply in envelope(client, *names, parameters=parameters):
        assert reply.startswith(b"250"), reply
    assert client.say("DATA").startswith(b"354")
    return bytes(client.say(f"{text}."))


def rows(state: Path) -> int:
    with sqlite3.connect(state / "answers.sqlite3") as connection:
        return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])


FULL = "552 5.2.2 Quota exceeded"
