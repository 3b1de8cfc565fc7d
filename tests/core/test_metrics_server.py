"""The metrics endpoint against clients that take their time."""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from types import SimpleNamespace
from typing import NoReturn

import pytest
from prometheus_client import CollectorRegistry

import fumi_core.runtime.metrics_server
from fumi_core.runtime.addresses import parse_address
from fumi_core.runtime.counting import Counter, Histogram, Tallied
from fumi_core.runtime.listening import bind
from fumi_core.runtime.metrics_server import MAX_QUERY, MAX_REQUESTS, Answer, MetricsServer, Page, Request
from tests.support.waiting import until

ASKED: queue.Queue[None] = queue.Queue()
HELD_SIGNALS: queue.Queue[Answer] = queue.Queue()


def held(request: Request) -> Answer:
    """A page that says when it is asked for, and waits for its answer."""
    ASKED.put(None)
    return HELD_SIGNALS.get(timeout=60)


BIG = Answer("x" * 6_000_000)
"""More than fits between a server and a client that does not read."""


PAGES: dict[str, Page] = {
    "/held": held,
    "/big": lambda request: BIG,
    "/asked": lambda request: Answer(f"{request.path} {dict(request.query)}\n"),
}


@pytest.fixture
def endpoint() -> Iterator[int]:
    """Its port."""
    (sock,) = bind(parse_address("127.0.0.1:0"))
    registry = CollectorRegistry()
    Counter("things", "Things.", ("kind",), registry).labels("one").inc()
    Tallied("others", "Others.", ("kind",), registry, lambda: [(("one",), 1)])
    Histogram("times", "Times.", ("kind",), registry, (1, 2)).labels("one").observe(1)
    endpoint = MetricsServer([sock], registry, readiness=lambda: None, pages=PAGES)
    yield sock.getsockname()[1]
    endpoint.close()


@pytest.mark.parametrize("drip", [b"", b"GET /healthz HTTP/1.0\r\nX: y", b"GET /metrics HTTP/1.0\r\n\r\n"])
def test_clients_that_never_finish_do_not_keep_it_busy(endpoint: int, monkeypatch: pytest.MonkeyPatch, drip: bytes) -> None:
    monkeypatch.setattr(fumi_core.runtime.metrics_server, "HEAD_TIMEOUT", 0.5)
    monkeypatch.setattr(fumi_core.runtime.metrics_server, "REQUEST_TIMEOUT", 0.5)
    over = threading.Event()
    slow = [socket.create_connection(("127.0.0.1", endpoint), 30) for _ in range(MAX_REQUESTS)]
    for sock in slow:
        sock.sendall(drip)

    def dawdle() -> None:
        # Never silent for long, and never done.
        while not over.wait(0.05):
            for sock in slow:
                try:
                    sock.send(b"z")
                except OSError:
                    continue

    thread = threading.Thread(target=dawdle)
    thread.start()
    try:
        until(lambda: healthy(endpoint))
    finally:
        over.set()
        thread.join()
        for sock in slow:
            sock.close()


@pytest.mark.parametrize("said", [b"", b"GET /healthz HTTP/1.0\r\nX: y"], ids=["nothing", "half"])
def test_silent_clients_make_room_for_one_that_comes_and_for_no_other_reason(
    endpoint: int, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(fumi_core.runtime.metrics_server, "HEAD_TIMEOUT", 1000)
    with contextlib.ExitStack() as stack:
        # Older than the silent ones, and not silent.
        asking = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint), 30))
        asking.sendall(b"GET /held HTTP/1.0\r\n\r\n")
        ASKED.get(timeout=60)
        silent = []
        for _ in range(MAX_REQUESTS - 1):
            silent.append(stack.enter_context(socket.create_connection(("127.0.0.1", endpoint), 30)))
            silent[-1].sendall(said)
        assert healthy(endpoint)
        assert ended(silent[0])
        assert healthy(endpoint)
        silent[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n" if not said else b"\r\n\r\n")
        assert silent[-1].recv(1000).startswith(b"HTTP/1.0 200")
        HELD_SIGNALS.put(Answer("at last"))
        with asking.makefile("rb") as answer:
            assert answer.read().endswith(b"at last")


def test_a_request_without_an_end_has_its_time(endpoint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fumi_core.runtime.metrics_server, "HEAD_TIMEOUT", 0.1)
    with socket.create_connection(("127.0.0.1", endpoint), 30) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n")
        assert ended(sock)


def test_if_all_clients_have_sent_a_request_the_oldest_is_closed(endpoint: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_REQUESTS):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint), 30))
            sock.sendall(b"GET /big HTTP/1.0\r\n\r\n")
        assert healthy(endpoint)


def ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=20) as answer:
            return bool(answer.read() == b"ok\n")
    except (OSError, HTTPException):
        return False


def test_an_accept_header_that_makes_no_sense_gets_the_text_format(endpoint: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{endpoint}/metrics")
    request.add_header("Accept", "application/openmetrics-text;version=abc")
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")


def test_a_scraper_that_comes_when_descriptors_have_run_out_costs_no_processor_time(
    endpoint: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def fail(self: object) -> NoReturn:
        tried.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("socketserver.TCPServer.get_request", fail)
        paused: list[float] = []
        over = threading.Event()

        def sleep(seconds: float) -> None:
            paused.append(seconds)
            over.wait(seconds)

        # Of this module alone: others sleep meanwhile.
        patch.setattr(fumi_core.runtime.metrics_server, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        with socket.create_connection(("127.0.0.1", endpoint), 30):
            until(lambda: len(tried) > 2)
        over.set()
    assert len(tried) - len(paused) <= 1
    until(lambda: healthy(endpoint))


@pytest.mark.parametrize("path", ["/metrics", "/metrics?name[]=things_total", "/healthz", "/readyz", "/big", "/nowhere"])
def test_head_is_answered_like_get_without_the_body(endpoint: int, path: str) -> None:
    answers = []
    for method in ("GET", "HEAD"):
        connection = HTTPConnection("127.0.0.1", endpoint, timeout=60)
        connection.request(method, path)
        answer = connection.getresponse()
        assert bool(answer.read()) == (method == "GET")
        answers.append((answer.status, {name: value for name, value in answer.getheaders() if name != "Date"}))
        connection.close()
    get, head = answers
    assert head == get


def test_a_query_can_name_the_metrics(endpoint: int) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{endpoint}/metrics?name[]=things_total&name[]=others_total&name[]=times_bucket"
    ) as answer:
        names = {line.partition("{")[0] for line in answer.read().decode().splitlines() if not line.startswith("#")}
    assert names == {"things_total", "others_total", "times_bucket"}


@pytest.mark.parametrize(
    ("query", "read"),
    [
        ("", {}),
        ("?refresh=0", {"refresh": "0"}),
        ("?a=1&a=2&b=&c", {"a": "2", "b": "", "c": ""}),
        ("?a=%C3%A9%FF+x", {"a": "é\ufffd x"}),
        ("?" + "a=1&" * MAX_QUERY + "b=1", {"a": "1"}),
    ],
)
def test_a_page_gets_what_the_query_says(endpoint: int, query: str, read: dict[str, str]) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint}/asked{query}", timeout=30) as answer:
        assert answer.read().decode() == f"/asked {read}\n"
