"""An app whose handlers do whatever an app may do wrong: which, the local parts of the addresses say.

``read`` collects what each reading of a message came to that ended without an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fumi_core import Fumi, SMTPError

SLOW = 3.0
"""Seconds a slow handler takes."""


class Odd(BaseException):
    """Neither an Exception nor a wish to stop."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Words:
    """A message for SMTPError that is no str, and cannot be made one."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def _reject(message: Any, code: Any = 550) -> Callable[[Any], None]:
    def reject(ctx: Any) -> None:
        ctx.reject(message, code)

    return reject


def _throw(error: Any) -> Callable[[Any], NoReturn]:
    def throw(ctx: Any) -> NoReturn:
        raise error()

    return throw


def _odd_error(ctx: Any) -> NoReturn:
    error = SMTPError("odd")
    error.code, error.message = "550", None  # type: ignore[assignment]
    raise error


FAULTS: dict[str, Callable[[Any], Any]] = {
    "value": _throw(lambda: ValueError("wrong")),
    "unprintable": _throw(Unprintable),
    "odd": _throw(Odd),
    "exit": lambda ctx: sys.exit(3),
    "cancelled": _throw(asyncio.CancelledError),
    "stop": _throw(StopAsyncIteration),
    "no": _reject("handler: no"),
    "bye": _reject("handler: bye", 421),
    "digits": _reject("\u0665.\u0667.\u0661 digits that are not ASCII"),
    "digits2": _reject("5.\u0667.\u0661 digits that are not ASCII"),
    "lines": _reject("two\r\n250 lines\n\x0b\x1c\u2028 and more"),
    "surrogate": _reject("\ud800 half a character"),
    "none": _reject(None),
    "bytes": _reject(b"bytes"),
    "wordless": _reject(Words()),
    "empty": _reject(""),
    "long": _reject("x " * 3000),
    "success": _reject("not a refusal", 250),
    "text": _reject("a code that is text", "550"),
    "half": _reject("half a code", 450.5),
    "error": _odd_error,
}
"""Each of them ends in a refusal."""
RETURNS = ("returns", "returns-later")
"""Handlers that return a text, as if that were a refusal."""
SLOWLY = "slowly-"
"""Before the name of a fault: it comes after some time."""
AT_THE_END = ("before", "between", "after")
"""When the handler of a message does its fault: before it reads, after the first piece, or after the last."""
READINGS = ("unread", "twice", "two", "task", "returned", "tap", "end", "accept")
"""How a message is read: not at all, by two handlers, by two at once, by a task that outlives the handler; or well, though a
text is returned, a tap or what is called at the end of the transaction fails, or the words of the 250 are odd."""


class Wild:
    """The app's handlers. ``read`` is emptied by whoever looks at it."""

    def __init__(self, app: Fumi, authenticates: bool) -> None:
        self.read: list[bytes] = []
        self.opened = self.ended = 0
        self.connecting = ""
        app.on_connect(self._connect)
        app.on_mail_from(self._address)
        app.on_rcpt_to(self._address)
        app.on_data(self._data)
        app.on_data(self._later_data)
        app.on_close(self._close)
        if authenticates:
            app.on_auth(self._auth)

    async def _connect(self, ctx: Any, next: Any) -> None:
        self.opened += 1
        await _misbehave(self.connecting, ctx)
        await next()

    async def _close(self, ctx: Any, next: Any) -> None:
        self.ended += 1
        await _misbehave(self.connecting, ctx)

    async def _auth(self, ctx: Any, next: Any) -> None:
        await _misbehave(ctx.credentials.username, ctx)
        if ctx.credentials.username == "joe":
            ctx.accept("joe")

    async def _address(self, ctx: Any, next: Any) -> Any:
        word = ctx.address.address.partition("@")[0]
        if word == "returns":
            return "550 no"
        await _misbehave(word, ctx)
        if word == "end":
            ctx.session.envelope.at_end += (_throw(lambda: ValueError("at the end")),)
        await next()
        return "550 no" if word == "returns-later" else None

    async def _data(self, ctx: Any, next: Any) -> Any:
        """The recipients say how it is read, and which fault comes when."""
        words = [each.address.partition("@")[0] for each in ctx.session.envelope.rcpt_to]
        for word in words:
            if word == "unread":
                return None
            if word == "tap":
                ctx.stream.tap(_throw(lambda: ValueError("in a tap")))
            if word == "two":
                await asyncio.gather(self._read(ctx), self._read(ctx))
            if word == "task":
                self.task = asyncio.ensure_future(self._read_if_it_can_be(ctx))
                return None
            if word == "accept":
                ctx.accept("\u0662\u0665\u0660 accepted\r\nin two \ud800 lines")
            when, _, fault = word.partition("-")
            if when in AT_THE_END and fault in FAULTS:
                await self._fail(ctx, when, fault)
        await self._read(ctx)
        if "twice" in words:
            await next()
        return "550 no" if "returned" in words else None

    async def _later_data(self, ctx: Any, next: Any) -> None:
        await self._read(ctx)

    async def _fail(self, ctx: Any, when: str, fault: str) -> None:
        if when == "between":
            async for _ in ctx.stream:
                break
        if when == "after":
            await self._read(ctx)
        FAULTS[fault](ctx)

    async def _read_if_it_can_be(self, ctx: Any) -> None:
        with contextlib.suppress(Exception):
            await self._read(ctx)

    async def _read(self, ctx: Any) -> None:
        pieces = [piece async for piece in ctx.stream]
        if not ctx.size_exceeded:
            self.read.append(b"".join(pieces))


async def _misbehave(word: str, ctx: Any) -> None:
    if word.startswith(SLOWLY):
        await asyncio.sleep(SLOW)
    fault = FAULTS.get(word.removeprefix(SLOWLY))
    if fault is not None:
        fault(ctx)
