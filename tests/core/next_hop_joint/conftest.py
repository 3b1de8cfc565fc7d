"""A core with SMTP clients that delivers by LMTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fumi_core.program import builtin
from fumi_core.testing import RunningServer, running
from tests.core.next_hop_joint.delivery import Front, MakeStore, Store, StoreAnswer
from tests.core.scripted_hop import StartHop


@pytest.fixture
def store(scripted_hop: StartHop) -> MakeStore:
    def make(**answers: StoreAnswer) -> Store:
        return Store(scripted_hop, **answers)

    return make


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    with ExitStack() as stack:

        def make(hop: Store, state: Path | None = tmp_path / "state", **options: Any) -> RunningServer:
            app = builtin.build(f"lmtp:{hop.address}", state=state, name="front.example", close_timeout=0.2, **options)
            return stack.enter_context(running(app, record=False))

        yield make
