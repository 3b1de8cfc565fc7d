"""The type of a handler, one Protocol for each hook: a function of ``(ctx, next)``, either plain or a coroutine function.

They are for type checkers; at run time ``middleware.check`` says what a handler may be. The parameters may have any names.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol, TypeVar

from fumi_core.handlers.contexts import AuthContext, CloseContext, ConnectContext, DataContext, MailContext, RcptContext
from fumi_core.handlers.middleware import Next

HandlerResult = Awaitable[Next | None] | None
"""What a handler returns: None, or what ``next()`` gave; a coroutine function returns an awaitable of these."""


class ConnectHandler(Protocol):
    """A handler of ``on_connect``."""

    def __call__(self, ctx: ConnectContext, next: Next, /) -> HandlerResult: ...


class AuthHandler(Protocol):
    """A handler of ``on_auth``."""

    def __call__(self, ctx: AuthContext, next: Next, /) -> HandlerResult: ...


class MailHandler(Protocol):
    """A handler of ``on_mail_from``."""

    def __call__(self, ctx: MailContext, next: Next, /) -> HandlerResult: ...


class RcptHandler(Protocol):
    """A handler of ``on_rcpt_to``."""

    def __call__(self, ctx: RcptContext, next: Next, /) -> HandlerResult: ...


class DataHandler(Protocol):
    """A handler of ``on_data``."""

    def __call__(self, ctx: DataContext, next: Next, /) -> HandlerResult: ...


class CloseHandler(Protocol):
    """A handler of ``on_close``."""

    def __call__(self, ctx: CloseContext, next: Next, /) -> HandlerResult: ...


# Each hook returns the function it was given, with the type that it has.
Connect = TypeVar("Connect", bound=ConnectHandler)
Auth = TypeVar("Auth", bound=AuthHandler)
Mail = TypeVar("Mail", bound=MailHandler)
Rcpt = TypeVar("Rcpt", bound=RcptHandler)
Data = TypeVar("Data", bound=DataHandler)
Close = TypeVar("Close", bound=CloseHandler)
