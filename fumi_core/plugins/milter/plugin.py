"""``milter(address)``: a mail filter checks each step of a session, and may change messages before they are delivered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

from fumi_core.app import Fumi
from fumi_core.client.pool import Pool
from fumi_core.handlers.contexts import CloseContext, ConnectContext, DataContext, MailContext, RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments
from fumi_core.plugins.milter.conversation import Conversation, Filter
from fumi_core.plugins.sender_login import name_of
from fumi_core.runtime.addresses import SocketAddress, parse_address
from fumi_core.smtp.session import Session


def milter(
    address: str,
    *,
    failure: Literal["tempfail", "accept"] = "tempfail",
    skip_authenticated: bool = False,
    changes_envelope: bool = True,
    connect_timeout: float = 30.0,
    command_timeout: float = 30.0,
    content_timeout: float = 300.0,
    login: Callable[[Any], str] = name_of,
    reuse_connections: bool = False,
) -> Callable[[Fumi], None]:
    """Check mail with the filter at ``address`` (HOST:PORT or unix:/path), by the milter protocol, versions 2 to 6.

    When the filter cannot be reached, is too slow or violates the protocol, the client gets 451 4.7.1; with ``failure="accept"``
    its mail is accepted as if there were no filter. EHLO's name is sent to the filter just before MAIL. With
    ``skip_authenticated`` the filter gets nothing about mail from authenticated users, and connects for other clients at MAIL.

    Use it before the handler that delivers, and several filters in the order in which they may change a message.
    ``changes_envelope``: that handler takes sender and recipients from ``session.envelope`` after the message has arrived. If it
    is False, a change of them is a failure of the filter. A message that a filter quarantines is rejected with 550.

    A proxy's own connection, such as a health check (a PROXY header with LOCAL), is no client: the filter gets it only if it
    sends mail, at MAIL. A connection to the filter serves one client, with all its messages. With ``reuse_connections``, and
    version 6 of the protocol, it then serves another client: rspamd supports that, filters with libmilter 8.17 do not.

    Timeouts are in seconds: to connect, for an answer, and for one about content. ``login`` returns the name of the object given
    to ``ctx.accept()``. Raises ValueError for an invalid argument.
    """
    if failure not in ("tempfail", "accept"):
        raise ValueError(f'milter: failure is "tempfail" or "accept", not {failure!r}')
    seconds = {"connect_timeout": connect_timeout, "command_timeout": command_timeout, "content_timeout": content_timeout}
    pool: Pool[Any] = Pool()
    filter = Filter(
        address=_address(address),
        on_failure=failure,
        changes_envelope=changes_envelope,
        login=login,
        reuse_connections=reuse_connections,
        pool=pool,
        **{name: arguments.positive("milter", name, value) for name, value in seconds.items()},
    )

    def plugin(app: Fumi) -> None:
        handlers = _Handlers(filter)
        if not skip_authenticated:
            app.on_connect(handlers.connect)
        app.on_mail_from(handlers.mail_of_others if skip_authenticated else handlers.mail)
        app.on_rcpt_to(handlers.rcpt)
        app.on_data(handlers.data)
        app.on_close(handlers.close)
        app.at_close(pool.close)

    return plugin


class _Handlers:
    """The conversation about each session is in ``session.state``."""

    def __init__(self, filter: Filter) -> None:
        self._filter = filter

    async def connect(self, ctx: ConnectContext, next: Next) -> None:
        self._end(ctx.session)  # a trusted proxy has named another client by XCLIENT
        if not ctx.session.health_check:
            await self._conversation(ctx.session).connected()
        await next()

    async def mail(self, ctx: MailContext, next: Next) -> None:
        await self._conversation(ctx.session).mail(ctx.address)
        await next()

    async def mail_of_others(self, ctx: MailContext, next: Next) -> None:
        if ctx.session.user is None:
            await self._conversation(ctx.session).mail(ctx.address)
        await next()

    async def rcpt(self, ctx: RcptContext, next: Next) -> None:
        await self._conversation(ctx.session).recipient(ctx.address)
        await next()

    async def data(self, ctx: DataContext, next: Next) -> None:
        conversation = self._conversation(ctx.session)
        try:
            if conversation.undecided:
                await ctx.spool()
            if not ctx.size_exceeded:
                await conversation.message(ctx)
            if conversation.discards:
                conversation.log_discard()
                await ctx.stream.skip()
            else:
                await next()
        finally:
            conversation.release()

    def close(self, ctx: CloseContext, next: Next) -> Next:
        self._end(ctx.session)
        return next()

    def _conversation(self, session: Session) -> Conversation:
        found = session.state.get(self)
        if found is None:
            found = session.state[self] = Conversation(self._filter, session)
        return cast(Conversation, found)

    def _end(self, session: Session) -> None:
        conversation = session.state.pop(self, None)
        if conversation is not None:
            conversation.close()


def _address(text: str) -> SocketAddress:
    address = parse_address(text)
    if address.kind == "fd" or (address.kind == "tcp" and not (address.host and address.port)):
        raise ValueError(f"{address} is not a milter: write HOST:PORT, [V6]:PORT or unix:/path")
    return address
