"""Runs a connection's handlers one after another: the first step in the caller, the rest, if any, in a task.

Most handlers never suspend, and a task for each of them would cost more than the handler. So the caller runs a coroutine's first
step, in the context and as the current task of the connection's one task: ``asyncio.timeout()`` and ``current_task()`` work in it
as usual. Only a coroutine that suspends is handed to that task.

In place of a task for each chain of handlers, with which a message costs 103 µs and 0.45 of aiosmtpd's (0.45 … 0.45) instead of
84 µs and 0.40 (0.35 … 0.45; bench row core-hooks, Python 3.11.2). Delete it when Python 3.12 is the oldest that is supported and
``eager_start``, which also runs the first step at once but makes a task for each chain, costs about the same in that row.

Private names of asyncio: ``_enter_task`` and ``_leave_task`` of asyncio.tasks, in ``_first_step()``.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

Done = Callable[[BaseException | None], None]
_ENDED = object()
_Pending = tuple[Coroutine[Any, Any, None], Any, Done]


class HandlerRunner:
    """Runs one coroutine at a time: call ``run()`` again only when the previous coroutine has ended."""

    __slots__ = ("_cancelled", "_context", "_loop", "_pending", "_task", "_wakeup")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._context = contextvars.copy_context()
        self._task: asyncio.Task[None] | None = None
        self._pending: _Pending | None = None
        self._cancelled = False
        self._wakeup: asyncio.Future[None] | None = None

    def run(self, coroutine: Coroutine[Any, Any, None], done: Done) -> None:
        """Run it; ``done`` is called with its exception or None, at once if it did not suspend."""
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._serve(), context=self._context)
        try:
            yielded = self._first_step(coroutine.__await__(), self._task)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a handler must not end the server
            done(error)
            return
        if yielded is _ENDED:
            done(None)
            return
        self._pending = (coroutine, yielded, done)
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _first_step(self, steps: Iterator[Any], task: asyncio.Task[None]) -> Any:
        """What the first step yields to the event loop, or _ENDED."""
        outer = asyncio.current_task(self._loop)
        if outer is task:
            return next(steps, _ENDED)  # called from the ``done`` of a previous coroutine: the context is set already
        if outer is not None:
            _leave_task(self._loop, outer)
        _enter_task(self._loop, task)
        try:
            return self._context.run(next, steps, _ENDED)
        finally:
            _leave_task(self._loop, task)
            if outer is not None:
                _enter_task(self._loop, outer)

    def cancel(self) -> None:
        """Cancel the running coroutine, if there is one; its ``done`` gets the CancelledError."""
        if self._pending is not None and self._task is not None:
            self._cancelled = True
            self._task.cancel()

    def close(self) -> None:
        """No coroutine will be run any more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None  # its coroutine refers to this runner: a cycle that only the garbage collector would break

    async def _serve(self) -> None:
        while True:
            error = await self._work_arrives()
            assert self._pending is not None
            coroutine, yielded, done = self._pending
            outcome: BaseException | None = None
            try:
                await _Rest(coroutine, yielded, error)
            except (KeyboardInterrupt, GeneratorExit):
                raise  # GeneratorExit: the loop was closed while the coroutine waited
            except BaseException as raised:
                outcome = raised
            self._pending = None
            stop = self._forget_cancellation() and not self._cancelled and isinstance(outcome, asyncio.CancelledError)
            self._cancelled = False
            if stop:
                raise asyncio.CancelledError  # the loop is being shut down, and waits for this task to end
            try:
                done(outcome)
            except Exception as failure:
                self._loop.call_exception_handler({"message": "a dialogue failed", "exception": failure})

    async def _work_arrives(self) -> asyncio.CancelledError | None:
        """A cancellation between a first step and its continuation belongs to the coroutine, not to the task."""
        if self._pending is None:
            self._wakeup = self._loop.create_future()
            try:
                await self._wakeup
            except asyncio.CancelledError as error:
                if self._pending is None:
                    raise
                return error
            finally:
                self._wakeup = None
        return None

    def _forget_cancellation(self) -> bool:
        """Clear the task's cancellation; returns whether there was one."""
        cancelled = False
        while self._task is not None and self._task.cancelling():
            self._task.uncancel()
            cancelled = True
        return cancelled


class _Rest:
    """A coroutine whose first step ran elsewhere, continued from what that step yielded."""

    __slots__ = ("_coroutine", "_error", "_yielded")

    def __init__(self, coroutine: Coroutine[Any, Any, None], yielded: Any, error: BaseException | None) -> None:
        self._coroutine = coroutine
        self._yielded = yielded
        self._error = error

    def __await__(self) -> Generator[Any, Any, None]:
        coroutine, yielded, error = self._coroutine, self._yielded, self._error
        while True:
            try:
                if error is None:
                    yield yielded
                    step = coroutine.send
                    argument: Any = None
                else:
                    step, argument = coroutine.throw, error
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as thrown:
                step, argument = coroutine.throw, thrown
            error = None
            try:
                yielded = step(argument)
            except StopIteration:
                return
            except GeneratorExit as raised:
                raise RuntimeError("the coroutine raised GeneratorExit") from raised
