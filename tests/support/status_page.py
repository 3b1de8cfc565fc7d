"""What stands on a status page."""

from __future__ import annotations

import json
import urllib.request
from email.message import Message
from html.parser import HTMLParser
from typing import Any

VOID = {"meta"}


class Reader(HTMLParser):
    """What stands on a page: the tables as rows of words, the plots' labels, and the tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.style = self.title = self._pill = ""
        self.feed(text)
        assert not self.open, "a tag that is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables[self.title].append([])
        if tag in ("td", "th"):
            self.tables[self.title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.words.append(data)
        if "span" in self.open and "pill" in (self.tags[-1][1].get("class") or ""):
            self._pill = data
        if self.open[-1:] == ["h2"]:
            self.title = data
            self.tables[data] = []
        elif "table" in self.open:
            self.tables[self.title][-1][-1] += data

    def row(self, title: str, name: str) -> list[str]:
        return next(row[1:] for row in self.tables[title] if row[0] == name)

    @property
    def labels(self) -> list[str]:
        """The plots' labels."""
        return [label for tag, attributes in self.tags if tag == "svg" and (label := attributes.get("aria-label"))]

    @property
    def links(self) -> set[str]:
        return {attributes["href"] or "" for tag, attributes in self.tags if tag == "a"}

    @property
    def state(self) -> str:
        """What the pill beside the heading says."""
        return self._pill


def read_page(port: int, path: str = "/") -> tuple[Reader, Message]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return Reader(answer.read().decode()), answer.headers


def read_json(port: int, query: str = "") -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status.json{query}", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found
