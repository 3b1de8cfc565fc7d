"""The mail of --dev in headless Chromium, as wide as a phone and a desk, light and dark."""

from __future__ import annotations

import smtplib
import ssl
from email.message import EmailMessage
from pathlib import Path

from tests.support.browser import CONTRAST, OVERFLOW, Page, browser
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN

WIDTHS = (320, 390, 768, 1280)
HTML = "<h1>Hello</h1><script>document.title = 'run'</script><img src='http://192.0.2.1/x.gif'><style>* { display: none }</style>"


def messages() -> list[EmailMessage]:
    """One of usual size, and one with everything too long."""
    made = []
    for words in ("word", "word" * 60 + " " + "word " * 60):
        message = EmailMessage()
        message["From"], message["To"] = f'"{words}" <ann@example.org>', "bob@example.org"
        message["Subject"] = f"<b>{words}</b>"
        message.set_content(words + "\n")
        message.add_alternative(HTML, subtype="html")
        message.add_attachment(b"x", maintype="application", subtype="octet-stream", filename=f"{words}.bin")
        made.append(message)
    return made


def check(page: Page, url: str) -> None:
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page.resize(width, 900)
            page.scheme(scheme)
            page.open(url)
            page.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value(OVERFLOW) == []
            assert page.value(CONTRAST) == []


def test_the_mail_can_be_read_at_any_width_in_any_light_and_nothing_in_it_happens(programs: Programs, tmp_path: Path) -> None:
    tls, starttls, metrics = (free_port() for _ in range(3))
    flags = ["--listen", f"127.0.0.1:{tls}", "--starttls-listen", f"127.0.0.1:{starttls}", "--metrics", f"127.0.0.1:{metrics}"]
    programs.start(BIN / "fumi-edge", "--dev", *flags, port=metrics)
    with smtplib.SMTP_SSL("127.0.0.1", tls, context=ssl._create_unverified_context()) as client:
        for message in messages():
            client.send_message(message, "a@example.org", [f"user{number}@lists.example.org" for number in range(5)])
    with browser(tmp_path / "profile") as page:
        check(page, f"http://127.0.0.1:{metrics}/mail")
        links = page.value("[...document.querySelectorAll('table a')].map(each => each.href)")
        assert len(links) == 2
        for link in links:
            check(page, link)
            assert page.value("document.title").startswith("<b>word")
            assert HTML in page.value("[...document.querySelectorAll('pre')].map(each => each.textContent).join()")
        assert page.named("Log.entryAdded") == []
        asked = {each["request"]["url"] for each in page.named("Network.requestWillBeSent")}
        assert asked <= {f"http://127.0.0.1:{metrics}/mail", f"http://127.0.0.1:{metrics}/favicon.ico", *links}
