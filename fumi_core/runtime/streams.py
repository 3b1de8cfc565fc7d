"""The standard streams, for a program that was started without some of them (``2>&-``)."""

from __future__ import annotations

import os
import sys


def complete() -> None:
    """Open on /dev/null what is closed of stdin, stdout and stderr.

    Both programs begin with this: before anything else becomes descriptor 2, and gets what is meant for stderr.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115  for as long as there is a program
