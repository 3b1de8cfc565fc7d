"""Replacing certificate files as a renewal does, and recognising a certificate."""

from __future__ import annotations

import os
import shutil
import subprocess
import time


def serial(cert):
    return subprocess.check_output(["openssl", "x509", "-serial", "-noout", "-in", cert], text=True).strip().partition("=")[2]


def put(certificate, cert, key):
    """Replace two files as a careful program does: each at once, one right after the other. Returns the seconds in between."""
    for source, target in zip(certificate, (cert, key), strict=True):
        shutil.copy(source, f"{target}.new")
    begun = time.monotonic()
    for target in (cert, key):
        os.replace(f"{target}.new", target)
    return time.monotonic() - begun
