"""Ids of connections: short, printable, and unique over all processes."""

from __future__ import annotations

import itertools
import os
import secrets

_process = ""
_numbers = itertools.count(1)


def _new_prefix() -> None:
    global _process
    _process = secrets.token_hex(5)


_new_prefix()
os.register_at_fork(after_in_child=_new_prefix)


def unique_id() -> str:
    """The next id: for the UNIQUE_ID TLV, and for the logs."""
    return f"{_process}-{next(_numbers):x}"
