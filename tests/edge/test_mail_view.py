"""/mail of --dev: received mail, as text, for clients on this host only."""

from __future__ import annotations

import http.client
import os
import smtplib
import ssl
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from fumi_core.runtime.metrics_server import Answer, Request
from fumi_edge.mail_view.pages import MAX_LISTED, MAX_SHOWN_BYTES, MailView
from fumi_edge.mail_view.reading import MAX_FIELD, MAX_FIELDS, MAX_WORK
from tests.edge.program import Program
from tests.support.status_page import Reader

PORTS = ("--listen", "127.0.0.1:0", "--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
ENVELOPE = b"Return-Path: <a@example.org>\nDelivered-To: b@example.org\nReceived: from x\n\tby y; now\n"


class View:
    """The pages of a Maildir, requested from this host by default."""

    def __init__(self, maildir: Path) -> None:
        self.maildir = maildir
        for name in ("new", "cur", "tmp"):
            (maildir / name).mkdir(parents=True)
        self._pages = MailView(maildir).pages()
        self._stored = 0

    def store(self, text: bytes, directory: str = "new", name: str | None = None) -> Path:
        self._stored += 1
        path = self.maildir / directory / (name or f"{self._stored}.host")
        path.write_bytes(ENVELOPE + text)
        os.utime(path, ns=(self._stored * 10**9, self._stored * 10**9))
        return path

    def ask(self, path: str = "/mail", client: str = "127.0.0.1", host: str = "127.0.0.1:9465", **query: str) -> Answer:
        return self._pages[path](Request(path, query, client, host))

    def rows(self) -> list[list[str]]:
        reader = Reader(self.ask().text)
        return next(iter(reader.tables.values()))[1:]

    def links(self) -> list[str]:
        """The ids of the messages in the list."""
        tags = Reader(self.ask().text).tags
        found = [attributes["href"] or "" for tag, attributes in tags if tag == "a"]
        return [parse_qs(urlsplit(each).query)["id"][0] for each in found if "id=" in each]

    def message(self, text: bytes) -> Reader:
        """The page of a message that has just been stored."""
        self.store(text)
        answer = self.ask(id=self.links()[0])
        assert answer.status == "200 OK"
        return Reader(answer.text)


@pytest.fixture
def view(tmp_path: Path) -> View:
    return View(tmp_path / "maildir")


def test_the_latest_message_is_the_first_of_the_list(view: View) -> None:
    view.store(b"From: Ann <ann@example.org>\nSubject: one\n\nhello\n")
    view.store(b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\n\nhello\n", "cur", "7.host:2,S")
    assert [row[:3] for row in view.rows()] == [
        ["Grüße", "<a@example.org>", "b@example.org"],
        ["one", "Ann <ann@example.org>", "b@example.org"],
    ]


def test_there_is_a_page_before_the_first_message(tmp_path: Path) -> None:
    answer = MailView(tmp_path / "maildir").pages()["/mail"](Request("/mail", {}, "127.0.0.1", "localhost"))
    assert "0 messages" in Reader(answer.text).words


def test_a_message_keeps_its_address_when_a_mail_reader_moves_it(view: View) -> None:
    path = view.store(b"Subject: one\n\nhello\n", name="1.host")
    before = view.links()
    path.rename(view.maildir / "cur" / "1.host:2,RS")
    assert view.links() == before


def test_the_list_is_no_longer_than_it_says(view: View) -> None:
    for _ in range(MAX_LISTED + 1):
        view.store(b"Subject: x\n\nx\n")
    assert len(view.rows()) == MAX_LISTED
    assert "201 messages" in Reader(view.ask().text).words


def test_a_page_has_the_headers_the_texts_and_the_names_of_attachments(view: View) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Ann <ann@example.org>", "bob@example.org", "Grüße"
    message.set_content("Grüße\n")
    message.add_alternative("<b>bold</b><script>alert(1)</script>", subtype="html")
    message.add_attachment(b"%PDF" * 1000, maintype="application", subtype="pdf", filename="März.pdf")
    message.add_attachment("a,b\n", subtype="csv", filename="../../etc/passwd")
    page = view.message(message.as_bytes())
    assert {"Ann <ann@example.org>", "bob@example.org", "<a@example.org>", "b@example.org"} <= set(page.words)
    assert page.words.count("Grüße\n") == 1
    assert "<b>bold</b><script>alert(1)</script>\n" in page.words
    assert [row[:2] for row in page.tables["Attachments"][1:]] == [
        ["März.pdf", "application/pdf"],
        ["../../etc/passwd", "text/csv"],
    ]
    assert not {tag for tag, _ in page.tags} & {"b", "script", "img", "iframe", "form"}


def test_the_policy_allows_nothing_but_its_style(view: View) -> None:
    headers = dict(view.ask().headers)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'sha256-")


MARKUP = b"</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


@pytest.mark.parametrize(
    "text",
    [
        b"Subject: " + MARKUP + b"\nFrom: " + MARKUP + b"\n" + MARKUP + b": x\n\n" + MARKUP,
        b"Content-Type: text/html\n\n" + MARKUP,
        b'Content-Disposition: attachment; filename="' + MARKUP + b'"\nContent-Type: text/plain\n\nx\n',
        b"Content-Type: text/" + MARKUP + b"\n\nx\n",
    ],
)
def test_markup_is_text_wherever_it_stands(view: View, text: bytes) -> None:
    page = view.message(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img"}, tags
    assert {tag for tag, _ in Reader(view.ask().text).tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "h1", "h2", "bdi", "small", "p", "a"),
        *("article", "table", "thead", "tbody", "tr", "th", "td"),
    }


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"no header\n",
        b"\x00\x01\x1b[31m\xff\xfe\n",
        b"Subject: =?nonsense?b?AAAA?= =?utf-8?b?!!!?= =?utf-8?q?=ff?=\n\nx\n",
        b"Subject: \xff\xe2\x80\xae\n\nx\n",
        b"Content-Type: text/plain; charset=nonsense\n\n\xff\n",
        b"Content-Type: text/plain; charset=rot13\n\nx\n",
        b"Content-Type: text/plain; charset=idna\n\n\xff..x\n",
        b"Content-Type: text/plain; charset*0*=''%ff; charset*x=1\n\nx\n",
        b"Content-Type: multipart/mixed\n\nx\n",
        b"Content-Type: multipart/mixed; boundary=\n\n--\nx\n----\n",
        b"Content-Transfer-Encoding: base64\n\n====\xff\n",
        b"Content-Transfer-Encoding: nonsense\n\nx\n",
        b"Content-Transfer-Encoding: uuencode\n\nbegin 644 x\nnot uuencoded \xff\nend\n",
        b"Content-Disposition: attachment; filename*=utf-8''%ff%00; filename*1*=nonsense'x'%41\n\nx\n",
        b"Content-Disposition: attachment; filename*=nonsense''x\n\nx\n",
        b"Content-Type: message/rfc822\n\nContent-Type: message/rfc822\n\nSubject: inner\n\nx\n",
        b"".join(b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n" % (n, n) for n in range(3000)),
        b"Content-Type: multipart/mixed; boundary=x\n\n" + b"--x\n\nhello\n" * 1000,
        b"x: y\n" * 20_000 + b"\n",
        b"Subject: " + b"=?utf-8?q?x?= " * 5000 + b"\n\nx\n",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_no_message_breaks_the_pages(view: View, text: bytes) -> None:
    assert view.message(text).words
    assert len(view.rows()) == 1


@pytest.mark.parametrize(
    "start",
    [b"Subject: ", b"Content-Type: text/plain", b'Content-Disposition: attachment; filename="', b"Subject: =?utf-8?q?x?="],
)
def test_a_long_field_is_shown_in_part_and_downloaded_as_a_whole(view: View, start: bytes) -> None:
    # Python's email takes time that grows with the square of a field's length.
    text = start + b";=?a?q?" * 20_000 + b"\n\nhello\n"
    page = view.message(text)
    shown = [words for words in page.words if ";=?a?q?" in words]
    assert shown
    assert all(len(words) <= MAX_FIELD + 1 and words.endswith("…") for words in shown)
    assert view.ask("/mail.eml", id=view.links()[0]).data == ENVELOPE + text


def test_a_message_with_too_many_boundaries_and_lines_is_shown_as_its_source(view: View) -> None:
    nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(200))
    page = view.message(nested + b"\n" + b"x\n" * (MAX_WORK // 200))
    assert "source, which cannot be parsed" in page.words


def test_text_beside_an_encoded_word_is_utf8(view: View) -> None:
    view.store("Subject: é € =?utf-8?q?=C3=A9?= ü\n\n".encode())
    assert view.rows()[0][0] == "é € é ü"


@pytest.mark.parametrize("charset", [b"punycode", b"Idna"])
def test_an_encoding_of_domain_names_is_not_a_charset(view: View, charset: bytes) -> None:
    assert "mnchen-3ya" in view.message(b"Content-Type: text/plain; charset=%b\n\nmnchen-3ya" % charset).words


def test_the_list_keeps_few_fields_of_each_message(view: View) -> None:
    view.store(b"x: y\n" * (MAX_FIELDS - 3) + b"Subject: late\n\n")
    assert view.rows()[0][0] == "(no subject)"


def test_a_long_message_is_shown_in_part_and_downloaded_as_a_whole(view: View) -> None:
    text = b"Subject: long\n\n" + b"x" * MAX_SHOWN_BYTES
    page = view.message(text)
    assert any(words.startswith("Only the first 2 MB are shown") for words in page.words)
    assert view.ask("/mail.eml", id=view.links()[0]).data == ENVELOPE + text


@pytest.mark.parametrize("id", ["", "..", "../../etc/passwd", "/etc/passwd", "1.host", "new/1.host", "%2e%2e", "\0", "x" * 1000])
@pytest.mark.parametrize("path", ["/mail", "/mail.eml"])
def test_an_address_never_names_a_file(view: View, path: str, id: str) -> None:
    view.store(b"Subject: one\n\nhello\n", name="1.host")
    assert view.ask(path, id=id).status == "404 Not Found"


def test_only_files_are_messages(view: View, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (view.maildir / "new" / "link").symlink_to(tmp_path / "secret")
    (view.maildir / "new" / "directory").mkdir()
    os.mkfifo(view.maildir / "new" / "pipe")
    view.store(b"Subject: hidden\n\nx\n", name=".hidden")
    assert view.rows() == []


def test_a_message_that_was_removed_is_not_found(view: View) -> None:
    path = view.store(b"Subject: one\n\nhello\n")
    (id,) = view.links()
    path.unlink()
    assert view.ask(id=id).status == view.ask("/mail.eml", id=id).status == "404 Not Found"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9465", "localhost:9465", "LOCALHOST", "[::1]:9465", "127.8.8.8:1"])
@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "unix"])
def test_people_on_this_host_see_the_mail(view: View, client: str, host: str) -> None:
    assert view.ask(client=client, host=host).status == "200 OK"


@pytest.mark.parametrize("path", ["/mail", "/mail.eml"])
@pytest.mark.parametrize("client", ["192.0.2.1", "10.0.0.1", "2001:db8::1", "::ffff:192.0.2.1", "", "localhost"])
def test_the_mail_is_not_shown_to_other_hosts(view: View, path: str, client: str) -> None:
    view.store(b"Subject: one\n\nhello\n")
    answer = view.ask(path, client=client, id=view.links()[0])
    assert (answer.status, answer.data) == ("403 Forbidden", None)


@pytest.mark.parametrize(
    "host",
    [
        *("", "attacker.example", "attacker.example:9465", "localhost.attacker.example", "127.0.0.1.attacker.example:80"),
        *("localhost,attacker.example", "localhost, localhost", "0.0.0.0:9465", "[::]:9465", "192.0.2.1", "unix", "x@localhost"),
    ],
)
def test_a_name_of_somebody_else_does_not_show_the_mail(view: View, host: str) -> None:
    assert view.ask(host=host).status == "403 Forbidden"


def test_dev_mode_shows_a_message_that_has_arrived(tmp_path: Path) -> None:
    program = Program("--dev", *PORTS, cwd=tmp_path)
    try:
        with smtplib.SMTP_SSL("127.0.0.1", program.tls_port, context=ssl._create_unverified_context()) as client:
            client.sendmail("a@example.org", ["b@example.org"], "Subject: one\n\nhello\n")
        assert ("a", {"href": "/mail"}) in Reader(program.fetch("/")[1]).tags
        tags = Reader(program.fetch("/mail")[1]).tags
        (link,) = [each["href"] for tag, each in tags if tag == "a" and "id=" in (each["href"] or "")]
        assert link is not None
        page = Reader(program.fetch(link)[1])
        assert "hello\n" in page.words
        (file,) = (tmp_path / "maildir" / "new").iterdir()
        port = program.metrics_port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", link.replace("/mail?", "/mail.eml?"))
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Type"]) == (200, "message/rfc822")
        assert answer.headers["Content-Disposition"].endswith('.eml"')
        assert answer.read() == file.read_bytes()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/mail", headers={"Host": "attacker.example"})
        assert connection.getresponse().status == 403
        assert program.stop() == 0
        assert f"http://127.0.0.1:{port}/mail" in program.stdout.read()
    finally:
        program.kill()
