"""Runs a coroutine without a task, for connections that wait two or three times in their life.

A task costs itself, and for each wait a future, a handle and one more turn of the loop. A Walk's coroutine waits for a Pause, and
the call that ends the pause continues the coroutine at once, as a callback would. Only asyncio's own waits need a task: its
timeouts, futures and locks. A walk awaits them with ``in_task()``.

It replaces a task for each of the edge's connections. Without tasks, and with one timer for all handshakes, a connection of the
row edge-handshake of ``ops/bench`` takes about 50 fewer Python calls, of 335. Together with smaller cuts of calls its CPU is 0.96
(0.87 … 1.00) of what it was (30 rounds on a busy machine, Python 3.11.2); in edge-memory it takes 18.8 instead of 19.2 KiB.
Delete it when Python 3.12 is the oldest that is supported, and tasks with ``eager_start`` are within 3 % in edge-handshake. No
private names are used.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Current(threading.local):
    """What this thread is doing now; a thread may have an event loop of its own."""

    walk: Walk | None = None
    """The walk whose coroutine is running, if it is one."""


current = _Current()


class Pause(Generic[T]):
    """What one coroutine waits for, in a walk or in a task, until ``end()`` or ``fail()`` is called; later calls do nothing."""

    __slots__ = ("_error", "_result", "cancel", "ended", "resume")

    _result: T

    def __init__(self, cancel: Callable[[], bool] | None = None) -> None:
        """``cancel`` is called when the walk is cancelled, and must end the pause; None: the pause ends at once.

        It returns False if that for which the pause waits has ended already; the walk is then cancelled at its next pause.
        """
        self.cancel = cancel
        self.ended = False
        self.resume: Callable[[], object] | None = None
        """Continues the coroutine that waits."""
        self._error: BaseException | None = None

    def end(self, result: T) -> None:
        """Continue the coroutine with this result."""
        if not self.ended:
            self.ended = True
            self._result = result
            if self.resume is not None:
                self.resume()

    def fail(self, error: BaseException) -> None:
        """Continue the coroutine with this exception."""
        if not self.ended:
            self.ended = True
            self._error = error
            del error  # its traceback will refer to this frame: a reference cycle
            if self.resume is not None:
                self.resume()

    def __await__(self) -> Generator[Any, None, T]:
        if not self.ended:
            if current.walk is not None:
                yield self
            else:
                yield from self._future()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback refers to this frame: a reference cycle
        return self._result

    def _future(self) -> asyncio.Future[None]:
        """What a task waits for."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def resume() -> None:
            if not future.done():
                future.set_result(None)

        self.resume = resume
        return future


class Walk:
    """One coroutine, from ``start()`` on, and then ``ended()``: in ``start()`` already, if it never waits."""

    __slots__ = ("_cancelled", "_coroutine", "_pause")

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._pause: Pause[Any] | None = None
        self._cancelled = False

    def ended(self, error: BaseException | None) -> None:
        """Called at the end, with the coroutine's exception or None."""
        raise NotImplementedError

    def start(self) -> None:
        """Run the coroutine until it waits."""
        self._step()

    def cancel(self) -> None:
        """Raise CancelledError where the coroutine waits or, if it is running, where it waits next."""
        pause = self._pause
        if pause is None:
            self._cancelled = True
        elif pause.cancel is not None:
            self._cancelled = not pause.cancel()
        else:
            pause.resume = None
            self._step(asyncio.CancelledError)

    def _step(self, error: type[BaseException] | None = None) -> None:
        """Run the coroutine until it waits again; with ``error``, which is raised where it waits now."""
        outer, current.walk = current.walk, self
        self._pause = None
        try:
            pause = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            while not isinstance(pause, Pause):
                pause = self._coroutine.throw(RuntimeError(f"a walk cannot wait for {pause!r}: use in_task()"))
        except StopIteration:
            self.ended(None)
        except BaseException as raised:
            self.ended(raised)
            if isinstance(raised, KeyboardInterrupt | SystemExit):
                raise
        else:
            self._pause = pause
            pause.resume = self._step
        finally:
            current.walk = outer
        if self._cancelled and self._pause is not None:
            self._cancelled = False
            self.cancel()


async def in_task(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that needs to run in a task: a walk gives it one of its own, and a task awaits it as it is."""
    if current.walk is None:
        return await coroutine
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        await _end_of(task)
        return task.result()
    finally:
        del task  # it refers to its exception, whose traceback refers to this frame: a reference cycle


def _end_of(task: asyncio.Task[T]) -> Pause[None]:
    pause: Pause[None] = Pause(task.cancel)
    task.add_done_callback(lambda _: pause.end(None))
    return pause
