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


async def stop_signal() -> signal.Signals:
    """Wait for SIGTERM or SIGINT. A second one while the program drains ends it at once, as the signal's default does."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        if not received.done():
            received.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return await received
