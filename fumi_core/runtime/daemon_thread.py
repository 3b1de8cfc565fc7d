"""Threads that the program does not wait for when it ends, for functions that may be slow.

asyncio joins its own threads at the end, so a resolver or a file system that hangs would keep a program from stopping.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_in_daemon_thread(function: Callable[[], T]) -> T:
    """Return what the function returns, or raise what it raises. Each call starts a thread, so callers must limit their number.
    Raises OSError if no thread can be started.
    """
    answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def work() -> None:
        try:
            outcome: T | Exception = function()
        except Exception as error:
            outcome = error
        settle(answer, outcome)

    start_thread(work, "background")
    return await answer


def start_thread(act: Callable[[], object], name: str) -> threading.Thread:
    """Start a daemon thread with all signals blocked, so that other threads receive them. Raises OSError if it cannot start."""
    thread = threading.Thread(target=act, name=name, daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    except RuntimeError as error:
        # The system has no more threads.
        raise OSError(str(error)) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return thread


def settle(answer: asyncio.Future[T], outcome: T | Exception) -> None:
    """Set a future's result or error from another thread. Does nothing if its loop is closed or it is done."""
    with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime
        answer.get_loop().call_soon_threadsafe(_settle, answer, outcome)


def _settle(answer: asyncio.Future[T], outcome: T | Exception) -> None:
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
