"""An app whose Maildir is on a slow disk; run by a test as ``slow_maildir:app``."""

import os
import time

from fumi_core import Fumi
from fumi_core.delivery import maildir

_write = os.write


def slow(fd: int, data: bytes) -> int:
    time.sleep(0.002)
    return _write(fd, data)


maildir.os.write = slow  # type: ignore[attr-defined]
app = Fumi(auth_optional=True).use(maildir.Maildir("maildir"))
