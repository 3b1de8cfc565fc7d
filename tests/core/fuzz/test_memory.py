"""Nothing stays behind: neither of connections that are over, nor of octets that nobody wants while one is there."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest

from . import campaign, test_preamble, test_protocol, test_proxy_headers
from .conversing import SETTINGS, Conversation

INPUTS = 600
KIB = 1024
MAKERS = [test_protocol.session, test_proxy_headers.header, test_preamble.dialogue]


@contextmanager
def traced() -> Iterator[Callable[[], tuple[int, int]]]:
    """Octets that Python holds more than at the beginning of the block, now and at the most."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    def taken() -> tuple[int, int]:
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
        return now - before, peak - before

    try:
        yield taken
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_connections_that_are_over_hold_no_memory(make: Callable[[Random], Any]) -> None:
    def again() -> None:
        for number in range(INPUTS):
            make(campaign.chance("memory", number)).check()

    again()  # so that every cache has what it will have
    with traced() as taken:
        again()
        assert taken()[0] < 100 * KIB


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"NOOP ",
        b"AUTH PLAIN ",
        b"MAIL FROM:<",
        b"AUTH LOGIN\r\n",
        b"BDAT 99999999999\r\n",
        b"EHLO x\r\nBDAT 99999999999 LAST\r\n",
    ],
)
def test_long_lines_and_content_that_no_handler_reads_are_not_collected(begin: bytes) -> None:
    setting = next(setting for setting in SETTINGS if setting.name == "knowing")
    conversation = Conversation(setting)
    conversation.hear(setting.greeting + begin)
    piece = b"A" * 64 * KIB
    with traced() as taken:
        for _ in range(100):
            conversation.hear(piece)
        assert taken()[1] < 4 * len(piece)
