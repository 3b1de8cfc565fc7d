"""The documents lead where they say: each link to a file and heading that are there, each list of contents to all of its page."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.support.readme import ROOT, blocks, sections

LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
WITH_CONTENTS = ("CONTRIBUTING.md", "fumi_core/README.md", "fumi_core/PROGRAM.md", "fumi_core/MIGRATING.md")
REGISTRIES = re.compile(
    r"\b((docker\.io/|(gcr|ghcr|quay|lscr|azurecr|crates)\.io|hub\.docker\.com|mcr\.microsoft\.com|ecr\.aws|pkg\.dev)"
    r"|(pypi\.(python\.)?|pythonhosted\.|npmjs\.)(org|com)"
    r"|registry[\w-]*\.(?!example\.)([\w-]+\.)+(io|com|org|net))"
)
"""Hosts of images and packages; docker.io alone is a package of Debian."""
STAYS = re.compile(r"^(\w+=\S+ )*(fumi-core|fumi-edge|haproxy -W|stunnel/run|python serve\.py|ops/run)\b")
RETURNS = re.compile(r"--(check|hash-password|version|emit)\b|&$")


def _prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def _anchors(path: Path) -> list[str]:
    """The page's headings as GitHub links to them."""
    return [re.sub(r"[^\w -]", "", section.title.lower()).replace(" ", "-") for section in sections(path.read_text())]


@pytest.mark.parametrize("page", LISTED)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", _prose(path)):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target


def test_no_file_names_the_host_of_a_registry_which_is_the_users_choice() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]
    found = {name: match[0] for name in listed if (match := REGISTRIES.search((ROOT / name).read_text(errors="replace")))}
    assert found == {}


@pytest.mark.parametrize("page", ["README.md", "fumi_core/README.md", "fumi_core/PROGRAM.md", "fumi_core/MIGRATING.md"])
def test_a_block_can_be_pasted_whole_since_only_its_last_command_may_stay_in_the_foreground(page: str) -> None:
    for kind, source in blocks((ROOT / page).read_text()):
        commands = source.replace("\\\n", " ").splitlines()
        staying = [command for command in commands if STAYS.search(command) and not RETURNS.search(command)]
        assert kind != "sh" or not staying or staying == commands[-1:], source


@pytest.mark.parametrize("page", WITH_CONTENTS)
def test_the_contents_at_the_top_are_all_headings_of_the_page(page: str) -> None:
    path = ROOT / page
    listed = re.findall(r"^ *- \[.*\]\(#(.*)\)$", sections(path.read_text())[0].text, re.MULTILINE)
    headings = [anchor for anchor, section in zip(_anchors(path), sections(path.read_text()), strict=True) if section.level == 2]
    assert [anchor for anchor in listed if anchor in headings] == headings
