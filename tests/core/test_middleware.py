"""The order of handlers, and what goes wrong in them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fumi_core.handlers.middleware import Next, compose


def run(*handlers: Any) -> list[str]:
    log: list[str] = []
    asyncio.run(compose(handlers)(log))
    return log


def onion(name: str) -> Any:
    async def handler(log: list[str], next: Next) -> None:
        log.append(f"{name} in")
        await next()
        log.append(f"{name} out")

    return handler


def test_handlers_run_like_an_onion() -> None:
    assert run(onion("a"), onion("b")) == ["a in", "b in", "b out", "a out"]


def test_a_handler_that_does_not_call_next_ends_the_chain() -> None:
    assert run(lambda log, next: log.append("only"), onion("never")) == ["only"]


def test_a_plain_function_may_call_next_and_leave_it() -> None:
    def plain(log: list[str], next: Next) -> None:
        next()
        log.append("plain")

    assert run(plain, onion("b")) == ["plain", "b in", "b out"]


def test_a_plain_function_may_return_next() -> None:
    assert run(lambda log, next: next(), onion("b")) == ["b in", "b out"]


def test_calling_next_twice_is_an_error() -> None:
    async def twice(log: list[str], next: Next) -> None:
        await next()
        await next()

    with pytest.raises(RuntimeError, match="twice"):
        run(twice, onion("b"))


def test_an_exception_passes_through_the_handlers_outside() -> None:
    async def catching(log: list[str], next: Next) -> None:
        try:
            await next()
        except ValueError:
            log.append("caught")

    async def failing(log: list[str], next: Next) -> None:
        raise ValueError

    assert run(catching, failing) == ["caught"]


def test_awaiting_one_next_twice_is_an_error() -> None:
    async def twice(log: list[str], next: Next) -> None:
        rest = next()
        await rest
        await rest

    with pytest.raises(RuntimeError, match="twice"):
        run(twice, onion("b"))
