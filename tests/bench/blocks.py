"""The bytes of the rows `edge-bytes-…`: blocks of 1 MiB, no two of them alike, so that a lost or doubled piece shows."""

import hashlib
import random
from collections.abc import Iterator

BLOCK = 1024 * 1024
NUMBER = 8


def blocks(count: int) -> Iterator[bytes]:
    """The first `count` blocks of BLOCK bytes, the same in every process: the block's number, then noise."""
    noise = random.Random(1).randbytes(BLOCK - NUMBER)
    for number in range(count):
        yield number.to_bytes(NUMBER, "big") + noise


def digest(count: int) -> str:
    """SHA-256 of the first `count` blocks, in hex."""
    total = hashlib.sha256()
    for block in blocks(count):
        total.update(block)
    return total.hexdigest()
