"""Replacing certificate files as a renewal does."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from tests.support.certificates import CertificateFiles


def put(certificate: CertificateFiles, cert: Path, key: Path) -> float:
    """Replace two files as a careful program does: each at once, one right after the other. Returns the seconds in between."""
    for source, target in zip(certificate, (cert, key), strict=True):
        shutil.copy(source, f"{target}.new")
    begun = time.monotonic()
    for target in (cert, key):
        os.replace(f"{target}.new", target)
    return time.monotonic() - begun
