"""Functions in threads that nobody waits for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from fumi_core.runtime.daemon_thread import run_in_daemon_thread


def test_it_gives_what_the_function_gives_or_raises() -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    async def both() -> None:
        assert await run_in_daemon_thread(threading.current_thread) is not threading.main_thread()
        with pytest.raises(ValueError, match="on purpose"):
            await run_in_daemon_thread(fail)

    asyncio.run(both())


def test_without_a_thread_it_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="can't start new thread"):
        asyncio.run(run_in_daemon_thread(lambda: 1))


def test_a_program_ends_although_one_hangs() -> None:
    program = """
import asyncio, threading
from fumi_core.runtime.daemon_thread import run_in_daemon_thread

async def main():
    try:
        async with asyncio.timeout(0.1):
            await run_in_daemon_thread(threading.Event().wait)
    except TimeoutError:
        print("given up")

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("given up\n", "")
