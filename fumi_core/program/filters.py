"""The mail filters of ``--milter``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fumi_core.app import Fumi
from fumi_core.delivery import DeliveryTarget
from fumi_core.plugins import milter
from fumi_core.runtime.settings import SettingError


def filters(settings: dict[str, Any], target: DeliveryTarget | None) -> list[Callable[[Fumi], None]]:
    """Return the filters as plugins, in order. Raises SettingError.

    They cannot change the sender and recipients of a message for a next hop, which has heard them already.
    """
    failure, changes_envelope = settings["milter_failure"], target is None or target.name not in ("smtp", "lmtp")
    if failure != "tempfail" and not settings["milter"]:
        raise SettingError("--milter-failure needs --milter: without a mail filter it has no effect")
    try:
        return [milter(str(each), failure=failure, changes_envelope=changes_envelope) for each in settings["milter"]]
    except ValueError as error:
        raise SettingError(f"--milter: {error}") from None
