"""A handler's first step runs where it stands, and is none the worse for it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

from fumi_core.handlers.runner import HandlerRunner


def run(*makers: Any) -> list[Any]:
    """Run coroutine functions one after another in one fiber; their outcomes."""

    async def main() -> list[Any]:
        fiber, outcomes = HandlerRunner(asyncio.get_running_loop()), []
        for maker in makers:
            done = asyncio.get_running_loop().create_future()
            coroutine: Coroutine[Any, Any, None] = maker(fiber) if maker.__code__.co_argcount else maker()
            fiber.run(coroutine, done.set_result)
            outcomes.append(await asyncio.wait_for(done, 5))
        fiber.close()
        return outcomes

    return asyncio.run(main())


def test_a_coroutine_that_does_not_suspend_is_done_at_once() -> None:
    async def main() -> bool:
        ended: list[object] = []

        async def quick() -> None:
            return

        fiber = HandlerRunner(asyncio.get_running_loop())
        fiber.run(quick(), ended.append)
        fiber.close()
        return ended == [None]

    assert asyncio.run(main())


def test_it_goes_on_after_suspending() -> None:
    steps = []

    async def slow() -> None:
        steps.append(1)
        await asyncio.sleep(0)
        steps.append(2)
        await asyncio.sleep(0.001)
        steps.append(3)

    assert run(slow, slow) == [None, None]
    assert steps == [1, 2, 3, 1, 2, 3]


def test_exceptions_come_out_before_and_after_suspending() -> None:
    async def early() -> None:
        raise ValueError("early")

    async def late() -> None:
        await asyncio.sleep(0)
        raise ValueError("late")

    assert [str(outcome) for outcome in run(early, late, early)] == ["early", "late", "early"]


def test_timeouts_work_from_the_first_step_on() -> None:
    async def waits() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)

    async def waits_for() -> None:
        await asyncio.wait_for(asyncio.Event().wait(), 0.01)

    assert [type(outcome) for outcome in run(waits, waits, waits_for)] == [TimeoutError] * 3


def test_a_timeout_of_zero_is_caught_inside() -> None:
    async def impatient() -> None:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(60)
        except TimeoutError:
            return
        raise AssertionError

    assert run(impatient, impatient) == [None, None]


def test_the_current_task_is_the_same_in_every_step() -> None:
    tasks = []

    async def look() -> None:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())

    assert run(look, look) == [None, None]
    assert tasks[0] is not None
    assert len(set(tasks)) == 1


def test_context_variables_survive_suspending() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def sets() -> None:
        variable.set(7)
        await asyncio.sleep(0)
        assert variable.get() == 7

    async def reads() -> None:
        assert variable.get() == 7

    assert run(sets, reads) == [None, None]


def test_a_cancelled_coroutine_ends_and_the_runner_goes_on() -> None:
    async def sleeps(fiber: HandlerRunner) -> None:
        asyncio.get_running_loop().call_soon(fiber.cancel)
        await asyncio.sleep(60)

    async def quick() -> None:
        await asyncio.sleep(0)

    outcomes = run(sleeps, quick, sleeps)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, type(None), asyncio.CancelledError]


def test_task_groups_and_gather_work_in_the_first_step() -> None:
    async def groups() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
        await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))

    assert run(groups, groups) == [None, None]
