"""Composes the handlers of one phase, as Koa does: each gets the context and ``next``, which runs the later handlers.

A handler is a coroutine function or a plain function. If a plain function returns an awaitable, it is awaited. If it calls
``next()`` and does not return the result, the later handlers run after it has returned.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from inspect import isasyncgenfunction, isawaitable, isgeneratorfunction, signature
from types import CoroutineType
from typing import Any

Handler = Callable[[Any, "Next"], Any]
Chain = Callable[[Any], Coroutine[Any, Any, None]]


class Next:
    """The later handlers of the phase. Call and await it once, ``await next()``, to run them.

    Raises what they raise, and RuntimeError the second time.
    """

    __slots__ = ("_called", "_context", "_handlers", "_index", "_started")

    def __init__(self, handlers: Sequence[Handler], context: Any, index: int) -> None:
        self._handlers = handlers
        self._context = context
        self._index = index
        self._called = False
        self._started = False

    def __call__(self) -> Next:
        """Raises RuntimeError when it is called a second time."""
        if self._called:
            raise RuntimeError("next() called twice")
        self._called = True
        return self

    def __await__(self) -> Generator[Any, Any, None]:
        """Raises RuntimeError when it is awaited a second time."""
        if self._started:
            raise RuntimeError("next() awaited twice")
        self._started = True
        if self._index == len(self._handlers):
            return iter(())  # type: ignore[return-value]
        return _step(self._handlers, self._index, self._context).__await__()


_RETURNS = "a handler returns None or the result of next(); to reject, call ctx.reject(message, code)"


async def _step(handlers: Sequence[Handler], index: int, context: Any) -> None:
    rest = Next(handlers, context, index + 1)
    result = handlers[index](context, rest)
    # Nearly all handlers are coroutine functions, and isawaitable() is slow.
    if type(result) is CoroutineType or (result is not None and result is not rest and isawaitable(result)):
        result = await result
    if result is not None and result is not rest:
        raise TypeError(f"{name_of(handlers[index])} returned {reprlib.repr(result)}: {_RETURNS}")
    if rest._called and not rest._started:
        await rest


def name_of(handler: Callable[..., Any]) -> str:
    """The handler's name in its source."""
    return str(getattr(handler, "__qualname__", None) or type(handler).__qualname__) + "()"


def check(handler: Handler, hook: str) -> None:
    """Raises TypeError for a handler that cannot work: it cannot be called with (ctx, next), or it is a generator."""
    if not callable(handler):
        raise TypeError(f"{hook} takes a function of (ctx, next), not {reprlib.repr(handler)}")
    if any(kind(each) for each in (handler, type(handler).__call__) for kind in (isgeneratorfunction, isasyncgenfunction)):
        raise TypeError(f"{hook}: {name_of(handler)} is a generator: a handler must not yield")
    try:
        parameters = signature(handler)
    except ValueError:
        return  # some functions written in C have no signature
    try:
        parameters.bind(None, None)
    except TypeError:
        raise TypeError(f"{hook}: handlers are called with (ctx, next), but {name_of(handler)} takes {parameters}") from None


def compose(handlers: Sequence[Handler]) -> Chain:
    """Return one function that runs the handlers in order. There must be at least one."""
    return partial(_step, tuple(handlers), 0)
