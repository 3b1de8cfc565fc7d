"""The status page in headless Chromium, as wide as a phone, a tablet and a desk, light and dark, idle and at work."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.browser import CONTRAST, OVERFLOW, Page, browser
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs, listening
from tests.support.starter import BIN
from tests.support.waiting import until

WIDTHS = (320, 390, 768, 1080, 1280)

# What is above the plots.
ABOVE_THE_PLOTS = """
(() => {
  const top = node => node.getBoundingClientRect().top, plots = top(document.querySelector('.plots'));
  return [...document.querySelectorAll('article')].filter(node => top(node) < plots).map(node => node.firstChild.textContent);
})()
"""


class Pages(NamedTuple):
    """The addresses of both programs' pages, and a way to send messages through both."""

    edge: str
    core: str
    send: Callable[[int], None]


@pytest.fixture
def status(programs: Programs, certificate: CertificateFiles) -> Pages:
    """An edge and a core at work; of the edge's backends one is up and one down, and its certificate expires soon."""
    core, tls, starttls, metrics, core_metrics = (free_port() for _ in range(5))
    flags = ["--listen", f"127.0.0.1:{core}", "--deliver", "discard:", "--metrics", f"127.0.0.1:{core_metrics}"]
    programs.start(BIN / "fumi-core", *flags, port=core_metrics)
    flags = ["--cert", str(certificate[0]), "--key", str(certificate[1]), "--metrics", f"127.0.0.1:{metrics}"]
    flags += ["--max-clients", "100", "--listen", f"127.0.0.1:{tls}", "--starttls-listen", f"127.0.0.1:{starttls}"]
    flags += ["--backend", f"127.0.0.1:{core}", "--backend", "unix:" + str(programs.directory / ("no-such-socket" * 3))]
    programs.start(BIN / "fumi-edge", *flags, port=metrics)
    until(lambda: listening(starttls), "the edge")
    context = ssl.create_default_context(cafile=str(certificate[0]))

    def send(times: int) -> None:
        for _ in range(times):
            with smtplib.SMTP("localhost", starttls) as client:
                client.starttls(context=context)
                client.sendmail("a@example.org", ["b@example.org"], "Subject: x\r\n\r\nx\r\n")

    return Pages(f"http://127.0.0.1:{metrics}/", f"http://127.0.0.1:{core_metrics}/", send)


@pytest.mark.parametrize("program", ["edge", "core"])
def test_it_can_be_read_at_any_width_in_any_light(program: str, status: Pages, tmp_path: Path) -> None:
    address = status.edge if program == "edge" else status.core
    with browser(tmp_path / "profile") as page:
        for busy in (False, True):
            if busy:
                status.send(20)
            for width in WIDTHS:
                for scheme in ("light", "dark"):
                    page.resize(width, 900)
                    page.scheme(scheme)
                    page.open(address)
                    assert page.value("document.documentElement.scrollWidth") <= width
                    assert page.value(OVERFLOW) == []
                    assert page.value(CONTRAST) == []
        assert {ground(page, scheme) for scheme in ("light", "dark")} == {"rgb(246, 247, 249)", "rgb(16, 20, 27)"}
        # Neither did the policy stop anything, nor was anything asked for but the page.
        assert page.named("Log.entryAdded") == []
        assert {each["request"]["url"] for each in page.named("Network.requestWillBeSent")} <= {address, address + "favicon.ico"}


def test_a_phone_shows_backends_and_certificates_before_the_plots(status: Pages, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.resize(390, 900)
        page.open(status.edge)
        assert page.value(ABOVE_THE_PLOTS) == ["Backends", "Certificates"]
        page.open(status.core)
        assert page.value(ABOVE_THE_PLOTS) == ["Delivery and next hop"]
        page.resize(1280, 900)
        assert page.value(ABOVE_THE_PLOTS) == []


def test_a_link_stops_the_refresh(status: Pages, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(status.edge)
        stop = page.value("[...document.links].find(each => each.textContent.startsWith('stop refreshing')).href")
        page.open(stop)
        assert page.value("document.querySelectorAll('meta[http-equiv=refresh]').length") == 0
        assert page.value("[...document.links].map(each => each.pathname)") == ["/", "/", "/metrics", "/readyz", "/status.json"]


def ground(page: Page, scheme: str) -> str:
    page.scheme(scheme)
    colour: str = page.value("getComputedStyle(document.body).backgroundColor")
    return colour


def test_it_refreshes_by_itself_and_needs_no_script(status: Pages, programs: Programs, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open(status.edge)
        status.send(7)
        rows = "[...document.querySelectorAll('tr')].map(row => [...row.children].map(cell => cell.textContent))"

        def upgraded() -> list[list[str]]:
            page.reloaded()
            return [row for row in page.value(rows) if row[0] == "upgraded"]

        # It may have refreshed while they were sent, and have some of them.
        until(lambda: upgraded() == [["upgraded", "", "7", "100 %"]], "a page with all of them")
