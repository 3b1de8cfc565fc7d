"""The standard streams, for a program that was started with some of them closed (``2>&-``)."""

from __future__ import annotations

import os
import sys


def complete() -> None:
    """Open /dev/null in place of closed stdin, stdout and stderr.

    Both programs call this first: otherwise another file becomes descriptor 2 and receives what is written to stderr.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            # open() returns the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115  for as long as there is a program
