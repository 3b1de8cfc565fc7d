"""Starting and stopping a program: its descriptor limit, and the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal


def raise_descriptor_limit() -> None:
    """Take all the descriptors the kernel will give: each connection is one, or two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some kernels refuse an unlimited soft limit; the old one then stays.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def stop_signal(*others: signal.Signals) -> signal.Signals:
    """Wait for SIGTERM, SIGINT or one of the others. A second one while the program drains ends it at once."""
    wanted = (signal.SIGTERM, signal.SIGINT, *others)
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        for each in wanted:
            loop.remove_signal_handler(each)
            signal.signal(each, _leave)
        if not received.done():
            received.set_result(number)

    for number in wanted:
        loop.add_signal_handler(number, stop, number)
    return await received


def _leave(number: int, frame: object) -> None:
    # By way of an exception, so that what is to be tidied up is.
    raise SystemExit(128 + number)
