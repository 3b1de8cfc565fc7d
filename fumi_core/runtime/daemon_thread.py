"""A function that may take its time, in a thread that nobody waits for at the end of the program.

asyncio's own threads are joined then, and a resolver or a file system that hangs would keep a program from stopping.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def run_in_daemon_thread(function: Callable[[], T]) -> T:
    """What the function gives, or raises. Each call has a thread, so callers bound their number. Raises OSError without one."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        outcome: T | None = None
        failure: Exception | None = None
        try:
            outcome = function()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_settle, answer, outcome, failure)

    start_thread(work, "background")
    return await answer


def start_thread(act: Callable[[], object], name: str) -> threading.Thread:
    """Start a daemon thread that receives no signals, which may be held for another thread. Raises OSError without one."""
    thread = threading.Thread(target=act, name=name, daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    except RuntimeError as error:
        # The system has no more threads to give.
        raise OSError(str(error)) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return thread


def _settle(answer: asyncio.Future[Any], outcome: Any, failure: Exception | None) -> None:
    if answer.done():
        return
    if failure is None:
        answer.set_result(outcome)
    else:
        answer.set_exception(failure)
