"""/mail and /mail.eml: a list of the messages, a page for each, and its file.

For people on this host only, and only with a name or address of this host in the URL (Request.names_this_host).

Everything in a message is shown as text: HTML is its source, and the page's policy allows no scripts, images or other files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlencode
from xml.etree.ElementTree import Element

from fumi_core.runtime.metrics_server import Answer, Page, Request
from fumi_core.status import wording
from fumi_core.status.history import INTERVAL
from fumi_core.status.markup import Content, document, element, policy
from fumi_core.status.tables import Column, Row, Table
from fumi_edge.mail_view import arrived, reading
from fumi_edge.mail_view.arrived import Entry

MAX_LISTED = 200
"""Messages in the list, the latest."""
MAX_HEAD_BYTES = 1 << 16
"""Bytes of each message that are read for the list."""
MAX_SHOWN_BYTES = 2_000_000
"""Bytes of a message that are read for its page."""

_STYLE = (files("fumi_core.status") / "status.css").read_text("utf-8") + (files(__package__) / "mail.css").read_text("utf-8")
_HEADERS = (("Content-Security-Policy", policy(_STYLE)), ("Referrer-Policy", "no-referrer"))
_ADDRESSES = ("From", "To", "Cc", "Date")
"""Fields that the page of a message shows above all others."""


class MailView:
    """The pages of one Maildir."""

    def __init__(self, maildir: Path) -> None:
        self._maildir = maildir
        self._headers = lru_cache(MAX_LISTED)(self._read_headers)

    def pages(self) -> Mapping[str, Page]:
        return {"/mail": _local(self._html), "/mail.eml": _local(self._file)}

    def _html(self, request: Request) -> Answer:
        if "id" in request.query:
            return self._of_one(request, self._message)
        return self._list(refreshing=request.query.get("refresh") != "0")

    def _file(self, request: Request) -> Answer:
        return self._of_one(request, _download)

    def _of_one(self, request: Request, answer: Callable[[Entry], Answer]) -> Answer:
        entry = arrived.find(self._maildir, request.query.get("id", ""))
        try:
            return _missing() if entry is None else answer(entry)
        except OSError:
            return _missing()  # removed in the meantime, most likely by a mail reader

    # The list

    def _list(self, refreshing: bool) -> Answer:
        found, now = arrived.entries(self._maildir), time.time()
        rows = [row for each in found[:MAX_LISTED] if (row := self._row(each)) is not None]
        columns = (
            Column("Subject", lambda row: element("a", element("bdi", row["subject"]), href=_link("/mail", row["id"]))),
            Column("From", lambda row: element("bdi", row["from"]), long=True),
            Column("To", lambda row: element("bdi", wording.listed(row["to"], 3)), long=True),
            Column("Size", lambda row: wording.size(row["size"]), number=True),
            Column("Received (UTC)", lambda row: wording.clock(row["received"], now), number=True),
        )
        title = wording.counted(len(found), "message")
        note = f"The latest {MAX_LISTED} are shown." if len(found) > MAX_LISTED else None
        table = Table(name="mail", title=title, columns=columns, rows=rows, note=note, blocks=True)
        refresh = ("stop refreshing", "/mail?refresh=0") if refreshing else ("refresh", "/mail")
        links = [(f"{refresh[0]} every {INTERVAL:.0f} s", refresh[1]), ("status page", "/")]
        body = [_header("Mail", str(self._maildir), links), element("main", table.element())]
        return _page(f"{title} in {self._maildir}", body, refreshing)

    def _row(self, entry: Entry) -> Row | None:
        try:
            headers = self._headers(entry.path)
        except OSError:
            return None  # removed in the meantime
        return {
            "id": entry.id,
            "subject": headers.first("Subject") or "(no subject)",
            "from": headers.sender,
            "to": headers.recipients or headers.every("To"),
            "size": entry.size,
            "received": entry.received,
        }

    def _read_headers(self, path: Path) -> reading.Headers:
        return reading.headers(arrived.read(path, MAX_HEAD_BYTES))

    # One message

    def _message(self, entry: Entry) -> Answer:
        found = reading.content(arrived.read(entry.path, MAX_SHOWN_BYTES))
        subject = found.headers.first("Subject") or "(no subject)"
        links = [("all messages", "/mail"), ("download (.eml)", _link("/mail.eml", entry.id))]
        facts = [(name, value) for name in _ADDRESSES for value in found.headers.every(name)]
        facts += [("Envelope sender", value) for value in found.headers.every("Return-Path")]
        if found.headers.recipients:
            facts.append(("Envelope recipients", ", ".join(found.headers.recipients)))
        facts += [("Size", wording.size(entry.size)), ("Received", wording.moment(entry.received))]
        cards = [element("article", element("h2", "Message"), _fields(facts))]
        if entry.size > MAX_SHOWN_BYTES:
            note = f"Only the first {wording.size(MAX_SHOWN_BYTES)} are shown; the download has all."
            cards.append(element("article", element("p", note)))
        cards += [_text(each) for each in found.texts]
        if found.attachments:
            cards.append(_attachments(found.attachments))
        if found.more:
            cards.append(element("article", element("p", f"{wording.counted(found.more, 'more part')} not shown.")))
        every = element("details", element("summary", element("h2", "All headers")), _fields(found.headers.fields))
        cards.append(element("article", every))
        return _page(subject, [_header(subject, None, links), element("main", cards)])


def _text(part: reading.Text) -> Element:
    title = f"{part.kind}, its source" if part.kind == "text/html" else part.kind
    return element("article", element("h2", title), element("pre", part.text, dir="auto"))


def _attachments(attachments: Iterable[reading.Attachment]) -> Element:
    columns = (
        Column("Name", lambda row: element("bdi", row["name"])),
        Column("Type", lambda row: row["kind"]),
        Column("Size", lambda row: wording.size(row["size"]), number=True),
    )
    rows = [each._asdict() for each in attachments]
    return Table(name="attachments", title="Attachments", columns=columns, rows=rows).element()


def _fields(fields: Iterable[tuple[str, str]]) -> Element:
    lines = [element("tr", element("th", name, scope="row"), element("td", element("bdi", value))) for name, value in fields]
    return element("table", element("tbody", lines), class_="fields")


def _header(title: str, about: str | None, links: Iterable[tuple[str, str]]) -> Element:
    shown: list[Content] = []
    for words, address in links:
        shown += [*([" · "] if shown else []), element("a", words, href=address)]
    heading = element("h1", element("bdi", title), [] if about is None else [" ", element("small", about)])
    return element("header", heading, element("p", shown))


def _page(title: str, body: Iterable[Content], refreshing: bool = False) -> Answer:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        [element("meta", http_equiv="refresh", content=f"{INTERVAL:.0f}")] if refreshing else [],
        element("title", title),
        element("style", _STYLE),
    )
    return Answer(document(element("html", head, element("body", body), lang="en")), "text/html", headers=_HEADERS)


def _link(page: str, id: str) -> str:
    return f"{page}?{urlencode({'id': id})}"


def _download(entry: Entry) -> Answer:
    headers = (("Content-Disposition", f'attachment; filename="{entry.id}.eml"'), ("Cross-Origin-Resource-Policy", "same-origin"))
    return Answer("", "message/rfc822", headers=headers, data=arrived.read(entry.path))


def _missing() -> Answer:
    return Answer("there is no such message\n", status="404 Not Found")


# Who may see it


def _local(page: Page) -> Page:
    """The same page, for clients on this host whose URL has a name or address of this host."""

    def answer(request: Request) -> Answer:
        if not request.is_from_this_host:
            return Answer("the mail is shown to clients on this host only\n", status="403 Forbidden")
        if not request.names_this_host:
            return Answer("use a URL with 127.0.0.1 or localhost as its host\n", status="403 Forbidden")
        return page(request)

    return answer
