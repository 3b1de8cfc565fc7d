"""The mail filters of ``--milter``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from fumi_core.app import Fumi
from fumi_core.delivery import DeliveryTarget
from fumi_core.plugins import milter
from fumi_core.plugins.milter.connection import problem
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.settings import SettingError


def filters(settings: dict[str, Any], target: DeliveryTarget | None) -> list[Callable[[Fumi], None]]:
    """Return the filters as plugins, in order. Raises SettingError.

    They cannot change the sender and recipients of a message for a next hop, which already has them.
    """
    failure, changes_envelope = settings["milter_failure"], target is None or target.name not in ("smtp", "lmtp")
    try:
        return [milter(str(each), failure=failure, changes_envelope=changes_envelope) for each in settings["milter"]]
    except ValueError as error:
        raise SettingError(f"--milter: {error}") from None


def check_filters(addresses: Iterable[SocketAddress]) -> None:
    """Connect to each filter, and negotiate. Raises SettingError."""
    for address in addresses:
        if reason := asyncio.run(problem(address)):
            raise SettingError(f"--milter {address}: {reason}")
