"""A test that hangs fails, says where each thread was, and the others go on."""

from __future__ import annotations

import faulthandler
import signal
import tempfile
from collections.abc import Generator
from types import FrameType

import pytest

# Far more than any test takes on a slow machine with others beside it, in seconds; and what is left for tidying up after that.
LIMIT, LONG_LIMIT, AGAIN = 300, 1800, 60

# A shell has what it runs in the background ignore Ctrl-C, and then nothing that a test started would be stopped.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _give_up(number: int, frame: FrameType | None) -> None:
    with tempfile.TemporaryFile("w+") as threads:
        faulthandler.dump_traceback(threads)
        threads.seek(0)
        pytest.fail(f"it hangs\n{threads.read()}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, LONG_LIMIT if item.get_closest_marker("long") else LIMIT, AGAIN)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
