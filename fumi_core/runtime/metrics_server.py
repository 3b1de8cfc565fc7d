"""The HTTP side of both programs: /metrics, /healthz, /readyz and whatever else a program adds.

It runs in a thread of its own, so that a slow scraper never delays mail. wsgiref serves, prometheus_client writes the metrics.

At most MAX_REQUESTS are served at once. A newcomer always gets a place, so that idle connections cannot lock out a health check:
the connection that has been silent longest is closed or, if all have sent their request, the oldest.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from urllib.parse import parse_qsl
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, disable_created_metrics, make_wsgi_app

from fumi_core.runtime.daemon_thread import start_thread

# A second series for each counter, with the time it was made: nothing here uses it.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Answer(NamedTuple):
    """A page's content: its text, content type, HTTP status, and headers beside those that every page has.

    ``data`` is sent in place of the text, for a content type without charset.
    """

    text: str
    kind: str = "text/plain"
    status: str = "200 OK"
    headers: tuple[tuple[str, str], ...] = ()
    data: bytes | None = None


Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
"""A WSGI application (PEP 3333)."""


class Request(NamedTuple):
    """A request for a page: its path, and the parameters of its query, each with its last value.

    ``client`` is the IP address of the client, or ``unix``; ``host`` is the Host field.
    """

    path: str
    query: Mapping[str, str]
    client: str = ""
    host: str = ""

    @property
    def is_from_this_host(self) -> bool:
        """Whether the client is at a loopback address or a Unix socket."""
        return self.client == "unix" or _is_loopback(self.client)

    @property
    def names_this_host(self) -> bool:
        """Whether the URL has ``localhost`` or a loopback address.

        A page elsewhere on the web could have its own name resolve to 127.0.0.1 (DNS rebinding) and so read, in a browser here,
        what is for this host only; its requests have that name in Host (RFC 9110 §7.2).
        """
        found = _HOST.fullmatch(self.host)
        name = "" if found is None else found["name"].strip("[]").lower()
        return name == "localhost" or _is_loopback(name)


def _is_loopback(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


Page = Callable[[Request], Answer]
"""Called in the server's thread for each request."""
Readiness = Callable[[], str | None]
"""Returns None when ready, else the reason in a few words. Called in the server's thread."""

_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:\d+)?")
MAX_QUERY = 1000
"""Characters of a query that are read; later ones are ignored."""
MAX_REQUESTS = 16
"""Requests served at once."""
PAUSE_SECONDS = 0.5
"""Seconds without accepting when descriptors have run out."""
PLACE_TIMEOUT = 2.0
"""Seconds to wait for a place; a client that finds no place by then is closed."""
HEAD_TIMEOUT = 2.0
"""Seconds for the head of a request. It fits one packet, and a lost packet is retransmitted within a second."""
REQUEST_TIMEOUT = 10.0
"""Seconds for one request from connection to response, however slow its client is."""


class MetricsServer:
    """Serves until ``close()``."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        registry: CollectorRegistry,
        *,
        readiness: Readiness,
        pages: Mapping[str, Page] | None = None,
    ) -> None:
        """Start serving on listening sockets, which this server then owns."""
        metrics = _of_metrics(registry)
        routes: dict[str, Page] = {"/healthz": lambda request: Answer("ok\n"), "/readyz": _readiness_page(readiness)}
        routes |= pages or {}

        def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                return metrics(environ, start_response)
            page = routes.get(path)
            answer = page(_request(environ)) if page else Answer("not found\n", status="404 Not Found")
            # A name from a file system may have bytes that are not text.
            body = answer.text.encode("utf-8", "replace") if answer.data is None else answer.data
            kind = f"{answer.kind}; charset=utf-8" if answer.data is None else answer.kind
            headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
            headers += [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), *answer.headers]
            start_response(answer.status, headers)
            return [body]

        self._servers = [_Server(sock) for sock in sockets]
        for server in self._servers:
            server.set_app(_with_head(application))
            start_thread(server.serve_forever, "metrics")

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _request(environ: Mapping[str, Any]) -> Request:
    query = environ.get("QUERY_STRING", "")[:MAX_QUERY]
    return Request(
        environ.get("PATH_INFO", ""),
        dict(parse_qsl(query, keep_blank_values=True)),
        environ.get("REMOTE_ADDR", ""),
        environ.get("HTTP_HOST", ""),
    )


def _readiness_page(readiness: Readiness) -> Page:
    def page(request: Request) -> Answer:
        problem = readiness()
        return Answer("ready\n") if problem is None else Answer(f"{problem}\n", status="503 Service Unavailable")

    return page


def _of_metrics(registry: CollectorRegistry) -> Application:
    application = make_wsgi_app(registry)

    def metrics(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            return application(environ, start_response)  # type: ignore[no-any-return]
        except (TypeError, ValueError):
            # wsgiref's Accept header parser fails on a malformed version.
            return application({**environ, "HTTP_ACCEPT": ""}, start_response)  # type: ignore[no-any-return]

    return metrics


def _with_head(application: Application) -> Application:
    """The same application, which answers HEAD like GET but without the body."""

    def both(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "HEAD":
            return application(environ, start_response)
        begun: list[Any] = []
        length = sum(map(len, application({**environ, "REQUEST_METHOD": "GET"}, lambda *given: begun.extend(given))))
        status, headers = begun
        start_response(status, [*(each for each in headers if each[0] != "Content-Length"), ("Content-Length", str(length))])
        return []

    return both


class _Handler(WSGIRequestHandler):
    server: _Server

    def parse_request(self) -> bool:
        whole = super().parse_request()
        self.server.head_received(self.request)
        return whole

    def log_message(self, format: str, *args: object) -> None:
        logging.getLogger("fumi.endpoint").debug(format, *args)

    def address_string(self) -> str:
        return str(self.client_address[0]) if self.client_address else "unix"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        name = sock.getsockname()
        self.server_name, self.server_port = (name[0], name[1]) if isinstance(name, tuple) else ("unix", 0)
        self.setup_environ()
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        # When each request has to be finished, the oldest first.
        self._heads: dict[Any, float] = {}
        self._requests: dict[Any, float] = {}

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except BlockingIOError:
            raise
        except OSError:
            # No descriptor is left. The scraper stays in the queue; accepting again at once would only burn CPU time.
            time.sleep(PAUSE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self._make_room()
            # A thread that is not at its socket at this moment notices later.
            if not self._free.acquire(timeout=PLACE_TIMEOUT):
                self.shutdown_request(request)
                return
        self._heads[request] = time.monotonic() + HEAD_TIMEOUT
        try:
            super().process_request(request, client_address or ("unix", 0))
        except RuntimeError:
            # The system has no more threads.
            self._release_place(request)
            raise

    def head_received(self, request: Any) -> None:
        """The head of a request has been received, whether it is valid or not."""
        if (due := self._heads.pop(request, None)) is not None:
            self._requests[request] = due - HEAD_TIMEOUT + REQUEST_TIMEOUT

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._release_place(request)

    def _release_place(self, request: Any) -> None:
        self._heads.pop(request, None)
        self._requests.pop(request, None)
        self._free.release()

    def service_actions(self) -> None:
        """Called every half second: closes overdue requests."""
        now = time.monotonic()
        for waiting in (self._heads, self._requests):
            for request, due in list(waiting.items()):
                if now >= due:
                    _shut_down(request)

    def _make_room(self) -> None:
        for request in [*self._heads, *self._requests][:1]:
            _shut_down(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Most often a scraper disconnected during the response, which is not our error; the traceback helps with anything else.
        logging.getLogger("fumi.endpoint").debug("request failed", exc_info=True)


def _shut_down(request: Any) -> None:
    """Make the thread that serves it read end of file."""
    # It may have ended by itself in the meantime.
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
