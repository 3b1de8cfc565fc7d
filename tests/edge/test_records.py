"""How many records one call reads: a second read that finds nothing costs as much as the first."""

from __future__ import annotations

import ssl
from typing import cast

import pytest

from fumi_edge.tls.records import ENDED, LONG_RECORD, MORE, RECORD_SIZE, After, read_records

ROOM = 4 * RECORD_SIZE


class Records:
    """A TLS socket that has received these records, and then nothing more; ``reads`` counts the calls."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)
        self.reads = 0

    def read(self, size: int, buffer: memoryview) -> int:
        self.reads += 1
        if not self.sizes:
            raise ssl.SSLWantReadError
        return self.sizes.pop(0)


def read(records: Records, streaming: bool) -> tuple[int, After | OSError]:
    return read_records(cast(ssl.SSLSocket, records), memoryview(bytearray(ROOM)), streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_command_is_one_read(streaming: bool) -> None:
    records = Records(LONG_RECORD - 1)
    assert read(records, streaming) == (LONG_RECORD - 1, MORE)
    assert records.reads == 1


def test_a_message_that_fits_into_one_record_is_one_read() -> None:
    records = Records(RECORD_SIZE - 1)
    assert read(records, streaming=False) == (RECORD_SIZE - 1, MORE)
    assert records.reads == 1


def test_records_after_a_full_one_are_read_at_once() -> None:
    assert read(Records(RECORD_SIZE, 5000, 7), streaming=False) == (RECORD_SIZE + 5007, MORE)


def test_long_records_after_a_long_one_are_read_at_once() -> None:
    assert read(Records(LONG_RECORD, 1200, 7), streaming=True) == (LONG_RECORD + 1207, MORE)


def test_no_record_is_read_for_which_there_may_be_no_room() -> None:
    records = Records(*[RECORD_SIZE] * 3, RECORD_SIZE - 1, 9)
    assert read(records, streaming=True) == (ROOM - 1, MORE)
    assert records.sizes == [9]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_end_after_records_is_the_end(streaming: bool) -> None:
    assert read(Records(0), streaming) == (0, ENDED)
    assert read(Records(RECORD_SIZE, 5, 0), streaming) == (RECORD_SIZE + 5, ENDED)
