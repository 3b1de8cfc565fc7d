"""Composes the handlers of one phase, Koa-style: each gets the context and ``next``, which runs the rest.

A handler is a coroutine function, or a plain function: what a plain one returns is awaited if it can be, and a ``next()`` that
it called without returning it runs when it has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from inspect import isawaitable
from types import CoroutineType
from typing import Any

Handler = Callable[[Any, "Next"], Any]
Chain = Callable[[Any], Coroutine[Any, Any, None]]


class Next:
    """The rest of the chain, to be called and awaited once: ``await next()``."""

    __slots__ = ("_called", "_context", "_handlers", "_index", "_started")

    def __init__(self, handlers: Sequence[Handler], context: Any, index: int) -> None:
        self._handlers = handlers
        self._context = context
        self._index = index
        self._called = False
        self._started = False

    def __call__(self) -> Next:
        """Raises RuntimeError the second time."""
        if self._called:
            raise RuntimeError("next() called twice")
        self._called = True
        return self

    def __await__(self) -> Generator[Any, Any, None]:
        """Raises RuntimeError the second time."""
        if self._started:
            raise RuntimeError("next() awaited twice")
        self._started = True
        if self._index == len(self._handlers):
            return iter(())  # type: ignore[return-value]
        return _step(self._handlers, self._context, self._index).__await__()

    @property
    def owed(self) -> bool:
        """Called, and then not awaited."""
        return self._called and not self._started


# What nearly all handlers return, told apart faster than by asking for a method.
_AWAITABLE = (CoroutineType, Next)


async def _step(handlers: Sequence[Handler], context: Any, index: int) -> None:
    rest = Next(handlers, context, index + 1)
    result = handlers[index](context, rest)
    if result is not None and (type(result) in _AWAITABLE or isawaitable(result)):
        await result
    if rest.owed:
        await rest


def compose(handlers: Sequence[Handler]) -> Chain:
    """One function that runs the handlers, of which there is at least one, in order."""
    handlers = tuple(handlers)

    def chain(context: Any) -> Coroutine[Any, Any, None]:
        return _step(handlers, context, 0)

    return chain
