"""Coroutines that run without a task: how they wait, fail, and are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fumi_core.runtime.taskless import Pause, Walk, current, in_task


class Called(Walk):
    """A walk that calls a function at its end."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], call: Callable[[BaseException | None], object]) -> None:
        super().__init__(coroutine)
        self._call = call

    def ended(self, error: BaseException | None) -> None:
        self._call(error)


class Walked:
    """A walk that has been started. ``ended`` are the exceptions with which it has ended: at most one, None for no exception."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.ended: list[BaseException | None] = []
        self.walk = Called(coroutine, self.ended.append)
        self.walk.start()


def test_a_walk_continues_where_its_pause_is_ended() -> None:
    pause: Pause[str] = Pause()
    seen: list[str] = []

    async def wait() -> None:
        seen.append("begun")
        seen.append(await pause)

    walked = Walked(wait())
    assert (seen, walked.ended) == (["begun"], [])
    pause.end("first")
    assert (seen, walked.ended) == (["begun", "first"], [None])
    pause.end("second")
    pause.fail(KeyError())
    assert (seen, walked.ended) == (["begun", "first"], [None])


def test_a_pause_that_has_ended_before_is_not_waited_for() -> None:
    pause: Pause[int] = Pause()
    pause.end(1)
    seen: list[int] = []

    async def wait() -> None:
        seen.append(await pause)

    assert Walked(wait()).ended == [None]
    assert seen == [1]


def test_a_walk_gets_the_exception_of_its_pause_and_ends_with_its_own() -> None:
    pause: Pause[None] = Pause()

    async def wait() -> None:
        try:
            await pause
        except KeyError:
            raise ValueError from None

    walked = Walked(wait())
    pause.fail(KeyError())
    assert [type(error) for error in walked.ended] == [ValueError]


def test_a_cancelled_walk_cleans_up_and_may_wait_for_that() -> None:
    waiting: Pause[None] = Pause()
    cleaning: Pause[None] = Pause()
    seen: list[str] = []

    async def wait() -> None:
        try:
            await waiting
        finally:
            await cleaning
            seen.append("clean")

    walked = Walked(wait())
    walked.walk.cancel()
    waiting.end(None)
    assert (seen, walked.ended) == ([], [])
    cleaning.end(None)
    assert seen == ["clean"]
    assert [type(error) for error in walked.ended] == [asyncio.CancelledError]


def test_a_walk_that_is_cancelled_while_it_runs_is_cancelled_where_it_waits_next() -> None:
    pause: Pause[None] = Pause()
    walk: Walk
    ended: list[BaseException | None] = []
    seen: list[str] = []

    async def wait() -> None:
        walk.cancel()
        seen.append("goes on")
        await pause
        seen.append("never")

    walk = Called(wait(), ended.append)
    walk.start()
    assert seen == ["goes on"]
    assert [type(error) for error in ended] == [asyncio.CancelledError]


def test_a_walk_that_continues_another_one_is_the_current_one_again_afterwards() -> None:
    pause: Pause[None] = Pause()
    own: Pause[None] = Pause()
    walks: list[Walk | None] = []

    async def wait() -> None:
        await pause
        walks.append(current.walk)

    async def end_the_pause() -> None:
        pause.end(None)
        walks.append(current.walk)
        await own

    one, other = Walked(wait()), Walked(end_the_pause())
    assert walks == [one.walk, other.walk]
    assert current.walk is None
    own.end(None)
    assert (one.ended, other.ended) == ([None], [None])


def test_a_pause_is_awaited_in_a_task_as_a_future_is() -> None:
    async def main() -> None:
        ending: Pause[str] = Pause()
        failing: Pause[str] = Pause()
        waiting: Pause[str] = Pause()
        tasks = [asyncio.ensure_future(_awaited(pause)) for pause in (ending, failing, waiting)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        ending.end("done")
        failing.fail(KeyError())
        tasks[2].cancel()
        await asyncio.wait(tasks)
        waiting.end("too late")
        assert tasks[0].result() == "done"
        assert isinstance(tasks[1].exception(), KeyError)
        assert tasks[2].cancelled()

    asyncio.run(main())


async def _awaited(pause: Pause[str]) -> str:
    return await pause


def test_what_needs_a_task_runs_in_one_and_the_walk_goes_on_without_it() -> None:
    async def in_time() -> str:
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        return "in time"

    async def too_late() -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    async def main() -> list[str]:
        pause: Pause[str] = Pause()
        seen: list[str] = []

        async def wait() -> None:
            seen.append(await in_task(in_time()))
            with pytest.raises(TimeoutError):
                await in_task(too_late())
            asyncio.get_running_loop().call_soon(pause.end, "pause")
            seen.append(await pause)

        assert await _end(wait()) is None
        await in_task(wait())  # in a task, too
        return seen

    assert asyncio.run(main()) == ["in time", "pause"] * 2


def test_cancelling_a_walk_cancels_its_task_and_waits_for_it() -> None:
    async def main() -> list[str]:
        seen: list[str] = []

        async def tidy_up() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                seen.append("tidy")

        async def wait() -> None:
            try:
                await in_task(tidy_up())
            finally:
                seen.append("walk")

        loop = asyncio.get_running_loop()
        ended: asyncio.Future[BaseException | None] = loop.create_future()
        walk = Called(wait(), ended.set_result)
        walk.start()
        await asyncio.sleep(0)
        walk.cancel()
        assert isinstance(await ended, asyncio.CancelledError)
        return seen

    assert asyncio.run(main()) == ["tidy", "walk"]


def test_a_walk_that_is_cancelled_when_its_task_has_just_ended_is_cancelled_where_it_waits_next() -> None:
    async def step() -> str:
        return "done"

    async def scenario() -> None:
        seen: list[str] = []

        async def wait() -> None:
            seen.append(await in_task(step()))
            await Pause[None]()
            seen.append("never")

        walked = Walked(wait())
        # This runs after the task's only step, and before the walk is continued.
        asyncio.get_running_loop().call_soon(walked.walk.cancel)
        while not walked.ended:
            await asyncio.sleep(0)
        assert [type(error) for error in walked.ended] == [asyncio.CancelledError]
        assert seen == ["done"]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_walk_in_another_thread_is_not_the_one_that_runs_here() -> None:
    inside, leave = threading.Event(), threading.Event()

    async def hold() -> None:
        inside.set()
        leave.wait(30)

    async def main() -> str:
        pause: Pause[str] = Pause()
        asyncio.get_running_loop().call_soon(pause.end, "done")
        return await pause

    thread = threading.Thread(target=Called(hold(), lambda error: None).start)
    thread.start()
    inside.wait(30)
    try:
        assert current.walk is None
        assert asyncio.run(main()) == "done"
    finally:
        leave.set()
        thread.join()


def test_a_walk_that_awaits_a_future_raises_an_error_that_names_in_task() -> None:
    async def main() -> BaseException | None:
        return await _end(asyncio.sleep(0))

    error = asyncio.run(main())
    assert isinstance(error, RuntimeError)
    assert "in_task" in str(error)


async def _end(coroutine: Coroutine[Any, Any, None]) -> BaseException | None:
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    Called(coroutine, ended.set_result).start()
    return await ended


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_not_caught(error: type[BaseException]) -> None:
    async def end_the_program() -> None:
        raise error

    ended: list[BaseException | None] = []
    with pytest.raises(error):
        Called(end_the_program(), ended.append).start()
    assert [type(each) for each in ended] == [error]


def test_nothing_is_left_for_the_garbage_collector() -> None:
    async def fail() -> None:
        raise KeyError

    async def wait(pause: Pause[None], outcome: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(KeyError):
            await in_task(outcome)
        await pause

    async def main() -> int:
        pauses: list[Pause[None]] = [Pause() for _ in range(3)]
        walks = [Called(wait(pause, fail()), lambda error: None) for pause in pauses]
        for walk in walks:
            walk.start()
        while not all(pause.resume for pause in pauses):
            await asyncio.sleep(0)
        while gc.collect():
            pass  # what other tests have left: tasks with finalizers go in two steps
        gc.disable()
        try:
            pauses[0].end(None)
            pauses[1].fail(KeyError())
            walks[2].cancel()
            del walk, walks, pauses
            return gc.collect()
        finally:
            gc.enable()

    assert asyncio.run(main()) == 0
