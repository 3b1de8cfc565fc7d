"""Faults by the hundred: no message lost, damaged or doubled without a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import campaign
from .cases import SETTINGS, Setting

EVERY_DAY = int(os.environ.get("FAULT_COUNT", "600"))
ALL = int(os.environ.get("FAULT_COUNT", "10000"))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_no_message_is_lost_damaged_or_doubled_by_some_hundred_faults(setting: Setting, tmp_path: Path) -> None:
    campaign.run(setting, EVERY_DAY, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_no_message_is_lost_damaged_or_doubled_by_ten_thousand_faults(setting: Setting, tmp_path: Path) -> None:
    campaign.run(setting, ALL, tmp_path)
