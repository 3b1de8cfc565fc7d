"""What every campaign has: nothing in it that another run would have otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fumi_core.smtp import sasl

from .world import loop as loop


@pytest.fixture(autouse=True)
def _same_challenge_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasl, "secrets", SimpleNamespace(randbits=lambda bits: 5321))
    monkeypatch.setattr(sasl, "time", SimpleNamespace(time_ns=lambda: 0))
