"""The man pages, which are made from the pages in Markdown: all sections and flags are in them, and man prints no warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fumi_core.cli import main as core
from fumi_core.version import VERSION
from fumi_edge.cli import main as edge
from tests.interop.test_flag_tables import DOCUMENTS, documented
from tests.support.readme import ROOT, sections

PROGRAMS = {"fumi-core": core, "fumi-edge": edge}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "ops/manpages.py", directory], check=True, stdout=subprocess.DEVNULL)
    return directory


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_is_in_the_page(directory: Path, name: str) -> None:
    page = (directory / f"{name}.1").read_text()
    assert page.startswith(f'.TH "{name.upper()}" "1" "" "Fumi {VERSION}"')
    flags = [option.opts[-1] for option in PROGRAMS[name].params if isinstance(option, click.Option)]
    assert not [flag for flag in flags if f"\\fB{flag}".replace("-", "\\-") not in page]


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_sections_are_those_of_the_document(directory: Path, name: str) -> None:
    """So that nothing refers to a section that the page does not have."""
    _, path, flags = DOCUMENTS[name]
    expected = ["NAME", "SYNOPSIS", "DESCRIPTION"]
    for section in sections((ROOT / path).read_text())[1:]:
        expected.append(section.title.upper() if section.level == 2 else section.title)
        expected += documented(path, flags) if section.title == flags else ()
    shown = re.findall(r'^\.S[HS] "?(.*?)"?$', (directory / f"{name}.1").read_text(), re.MULTILINE)
    assert [title.replace("\\-", "-").replace("\\(aq", "'") for title in shown] == [*expected, "SEE ALSO"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_man_shows_the_page_without_a_warning(directory: Path, name: str) -> None:
    command = ["man", "--warnings=all", "-l", str(directory / f"{name}.1")]
    shown = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env={"MANWIDTH": "100", "PATH": "/usr/bin:/bin"}
    )
    assert shown.stderr == ""
    assert f"{name} - " in shown.stdout
    for mark in ("| ---", "```", "](", "\\f", "\\&"):
        assert mark not in shown.stdout
