"""fumi-edge as a command that ends by itself."""

from __future__ import annotations

import os

from tests.starter import finished


def run(*flags, environment=None):
    """Run to the end; (status, lines of stderr but for the usage hint)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FUMI_")}
    done = finished("fumi-edge", *flags, env=clean | (environment or {}))
    return done.returncode, [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
