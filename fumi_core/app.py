"""``Fumi``, the SMTP server that apps are made of: its options, its handlers, ``listen()`` and ``close()``."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from inspect import iscoroutinefunction
from typing import Any, Self, TypeVar, Unpack

from fumi_core.handlers import hooks
from fumi_core.handlers.middleware import Handler, check, compose, name_of
from fumi_core.runtime.addresses import Networks, SocketAddress
from fumi_core.runtime.listening import bind
from fumi_core.runtime.logs import event, failure
from fumi_core.runtime.scoreboard import count_of_one_process
from fumi_core.server.listeners import Server
from fumi_core.server.observer import Observer, guarded
from fumi_core.server.setup import PHASES, Chains, DialogueSetup
from fumi_core.smtp import options as _options
from fumi_core.smtp.greetings import Greetings
from fumi_core.smtp.options import OptionArguments, Options
from fumi_core.smtp.tally import Tally

H = TypeVar("H", bound=Handler)


class Fumi:
    """An SMTP server. Add handlers, then call ``listen()``.

    There is one ``on_…`` method for each phase of a session. It adds a handler, a function of ``(ctx, next)``, returns it, and so
    can be used as a decorator. It raises TypeError for a function that cannot be called so. The handlers of a phase run in the
    order in which they were added.
    """

    def __init__(self, **options: Unpack[OptionArguments]) -> None:
        """The options are declared in ``fumi_core.smtp.options``; fumi_core/README.md has a table of them.

        Raises TypeError for an unknown option or a value of a wrong type, ValueError for an invalid value.
        """
        self.options: Options = _options.read(options)
        self._observer = Observer()
        self.tally = Tally()
        self.connection_count = count_of_one_process()
        self._handlers: dict[str, list[Handler]] = {phase: [] for phase in PHASES}
        self._chains: Chains = dict.fromkeys(PHASES)
        self._server: Server | None = None
        self._at_start: list[Callable[[], object]] = []
        self._at_close: list[Callable[[], object]] = []
        self._at_listen: list[Callable[[], Awaitable[object]]] = []
        self._closed: asyncio.Event | None = None  # of the last close()
        self._withheld: list[Callable[[], frozenset[str]]] = []
        self._not_offered: list[Callable[[], frozenset[str]]] = []

    @property
    def observer(self) -> Observer:
        """Its methods are called as things happen, for metrics. The default ``Observer`` does nothing; assign another one."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self._observer = guarded(observer)

    # Handlers

    def on_connect(self, handler: hooks.Connect) -> hooks.Connect:
        """Add a handler that runs before the banner. A rejection is sent in place of the banner, and the connection is closed."""
        return self._on("connect", handler)

    def on_auth(self, handler: hooks.Auth) -> hooks.Auth:
        """Add a handler of AUTH. ``ctx.accept(user)`` authenticates the client; without it the client gets 535."""
        return self._on("auth", handler)

    def on_mail_from(self, handler: hooks.Mail) -> hooks.Mail:
        """Add a handler of MAIL. ``ctx.address`` is the reverse-path."""
        return self._on("mail_from", handler)

    def on_rcpt_to(self, handler: hooks.Rcpt) -> hooks.Rcpt:
        """Add a handler of RCPT, which runs for each recipient. ``ctx.address`` is the forward-path."""
        return self._on("rcpt_to", handler)

    def on_data(self, handler: hooks.Data, *, first: bool = False) -> hooks.Data:
        """Add a handler of the message, which ``ctx.stream`` contains. 250 is sent after the last handler has returned.

        ``first`` puts it before the handlers that were added earlier.
        """
        return self._on("data", handler, first)

    def on_close(self, handler: hooks.Close) -> hooks.Close:
        """Add a handler that runs after a connection has ended, once for each that reached the ``on_connect`` phase."""
        return self._on("close", handler)

    def _on(self, phase: str, handler: H, first: bool = False) -> H:
        check(handler, f"on_{phase}")
        self._handlers[phase].insert(0 if first else len(self._handlers[phase]), handler)
        self._chains[phase] = compose(self._handlers[phase])
        return handler

    def forget(self, phase: str, handler: Callable[..., Any]) -> None:
        """Remove a handler from a phase, such as ``"data"``. Raises ValueError if the phase does not have it.

        Raises KeyError for a phase that is not one of ``connect``, ``auth``, ``mail_from``, ``rcpt_to``, ``data`` and ``close``.
        """
        self._handlers[phase].remove(handler)
        self._chains[phase] = compose(self._handlers[phase]) if self._handlers[phase] else None

    def use(self, plugin: Callable[[Self], None]) -> Self:
        """Call ``plugin`` with this app, so that it adds its handlers. Returns the app.

        Raises TypeError for a coroutine function.
        """
        if iscoroutinefunction(plugin):
            raise TypeError(
                f"{name_of(plugin)} is a coroutine function: a plugin must be a plain function, since use() does not await it"
            )
        plugin(self)
        return self

    def at_start(self, begin: Callable[[], object]) -> None:
        """Register a function that the first ``listen()`` calls in the event loop, in each process that serves."""
        self._at_start.append(begin)

    def at_close(self, release: Callable[[], object]) -> None:
        """Register a function that ``close()`` calls after the connections have ended, to close what is still open."""
        self._at_close.append(release)

    def at_listen(self, prepare: Callable[[], Awaitable[object]]) -> None:
        """Register a coroutine function that ``listen()`` awaits before the first connection is accepted."""
        self._at_listen.append(prepare)

    def withhold(self, extensions: Callable[[], frozenset[str]], *, take: bool = False) -> None:
        """Neither offer nor accept the extensions that this function returns: EHLO keywords such as ``DSN``, or ``AUTH XOAUTH2``.

        It is for delivery targets that cannot support an extension. The function is called at every EHLO, and at every MAIL and
        RCPT with parameters, so its result may change. With ``take``, parameters of these extensions are still accepted: the
        target itself decides about a client to which they were offered earlier.
        """
        self._not_offered.append(extensions)
        if not take:
            self._withheld.append(extensions)

    def configure(self, **options: Unpack[OptionArguments]) -> None:
        """Change options before ``listen()``. Raises TypeError and ValueError as the constructor does."""
        self.options = _options.override(self.options, options)

    def adopt(self, other: Fumi) -> Self:
        """Replace the options and handlers of this app by those of another app. Returns this app.

        If it is listening, new connections get the new ones, and open connections keep the old ones.
        """
        self.options = other.options
        self._handlers = {phase: list(handlers) for phase, handlers in other._handlers.items()}
        self._chains = dict(other._chains)
        self._at_listen = list(other._at_listen)
        self._withheld, self._not_offered = list(other._withheld), list(other._not_offered)
        self._at_close += [release for release in other._at_close if release not in self._at_close]
        self._at_start = list(other._at_start)
        if self._server is not None:
            self._server.configure(self._dialogue_setup(), self._logger())
            for begin in self._at_start:
                begin()
        return self

    # Serving

    async def listen(
        self, port: int = 0, host: str = "127.0.0.1", *, path: str | None = None, sock: socket.socket | None = None
    ) -> None:
        """Listen on a TCP port (0 picks a free one), a Unix socket's ``path`` or a listening ``sock``. Returns once it is bound.

        ``host`` is an address or a name; "" is every interface. The umask decides the permissions of a Unix socket. It may be
        called several times; the first call logs a warning if no client can ever send mail. Raises OSError if the address
        cannot be bound.
        """
        if sock is not None:
            sockets = [sock]
        elif path is not None:
            sockets = bind(SocketAddress("unix", path=path))
        else:
            sockets = bind(SocketAddress("tcp", host=host, port=port))
        server = await self.start()
        for each in sockets:
            self._listen(server, each)

    async def start(self) -> Server:
        """Begin to serve without listening, for a program that accepts the connections itself; returns the server.

        The first call logs a warning if no client can ever send mail. ``close()`` ends it.
        """
        if self._server is None:
            self._server = Server(self._dialogue_setup(), self._logger(), self.connection_count)
            problem = self.startup_problem()
            if problem is not None:
                event(logging.getLogger("fumi.core"), logging.WARNING, "no client can send mail", error=problem)
            for begin in self._at_start:
                begin()
            await self.prepare()
        return self._server

    def startup_problem(self) -> str | None:
        """Return the reason why no client can ever send mail with the present options and handlers, or None."""
        options = self._dialogue_setup().options
        if not options.auth_required or options.use_xclient:
            return None  # XCLIENT can name a user
        if not self._handlers["auth"]:
            return "authentication is required, and there is no on_auth handler: add one, or set auth_optional=True"
        if options.proxy_protocol == "off" and not (options.assume_tls or options.allow_insecure_auth):
            return "authentication is required and needs TLS, which no client can have: proxy_protocol is off"
        return None

    async def prepare(self) -> None:
        """Await the functions registered by ``at_listen()``, for use after ``adopt()``. Does nothing if it is not listening."""
        if self._server is not None:
            for prepare in self._at_listen:
                await prepare()

    async def close(self) -> None:
        """Stop accepting, wait up to ``close_timeout`` seconds for transactions to end, then close all connections.

        If this is cancelled, all connections are closed at once. A second call waits until the first has ended.
        """
        server, self._server = self._server, None
        if server is None:
            if self._closed is not None:
                await self._closed.wait()
            return
        self._closed = closed = asyncio.Event()
        try:
            await self._close(server)
        finally:
            for release in self._at_close:
                _release(release)
            closed.set()

    @property
    def addresses(self) -> list[tuple[str, int] | str]:
        """The bound addresses: ``(host, port)`` of TCP, the path of a Unix socket."""
        names = [sock.getsockname() for sock in (self._sockets(self._server) if self._server else ())]
        return [name[:2] if isinstance(name, tuple) else name for name in names]

    @property
    def port(self) -> int:
        """The first bound TCP port. Raises RuntimeError if there is none."""
        for address in self.addresses:
            if isinstance(address, tuple):
                return address[1]
        raise RuntimeError("not listening on a TCP port")

    def _dialogue_setup(self) -> DialogueSetup:
        options = self.options
        trusted = Networks(options.trusted_proxies)
        greetings = Greetings(options, _union(self._withheld), _union(self._not_offered))
        return DialogueSetup(options, self._chains, greetings, self.tally, self.observer, trusted)

    # Overridden by fumi_edge.Fumi

    def _listen(self, server: Server, sock: socket.socket) -> None:
        server.listen(sock)

    def _sockets(self, server: Server) -> list[socket.socket]:
        return server.sockets

    async def _close(self, server: Server) -> None:
        await server.close(self.options.close_timeout)

    def _logger(self) -> logging.Logger | None:
        if isinstance(self.options.logger, logging.Logger):
            return self.options.logger
        return logging.getLogger("fumi.core") if self.options.logger else None


def _release(release: Callable[[], object]) -> None:
    """Call a function registered by ``at_close()``. An exception is logged, so that the other functions are called too."""
    try:
        release()
    except Exception as error:
        failure(logging.getLogger("fumi.core"), "at_close failed", error)


def _union(functions: Sequence[Callable[[], frozenset[str]]]) -> Callable[[], frozenset[str]]:
    functions = tuple(functions)
    return lambda: frozenset().union(*(function() for function in functions))
