"""Imports go one way only: a room may import the rooms behind it in its row, and never one before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ["cli", "program", "plugins", "delivery", "client", "testing", "app", "server", "handlers", "smtp"]
CORE += ["proxy_protocol", "errors", "status", "runtime", "version"]
EDGE = [
    "cli",
    "program",
    "status",
    "mail_view",
    "emit",
    "app",
    "edge",
    "services",
    "settings",
    "connection",
    "certificate_reload",
    "backends",
    "metrics",
    "tls",
    "sockets",
]
OF_THE_CORE = {"proxy_protocol", "runtime", "status", "smtp.replies", "smtp.grammar", "smtp.data", "version"}
"""What the whole edge may use of the core; ``app.py`` and ``program/`` may import the server, too."""


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in (ROOT / package).rglob("*.py"):
        first = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if not first.startswith("__"):
            yield first, path


@pytest.mark.parametrize(("package", "rooms"), [("fumi_core", CORE), ("fumi_edge", EDGE)])
def test_no_import_runs_back(package: str, rooms: list[str]) -> None:
    for room, path in _modules(package):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == package and parts[1] in rooms:
                assert rooms.index(room) <= rooms.index(parts[1]), f"{path}: imports {name}"


def test_the_core_does_not_know_the_edge_and_the_edge_little_of_the_core() -> None:
    assert not [path for _, path in _modules("fumi_core") for name in _imports(path) if name.startswith("fumi_edge")]
    for room, path in _modules("fumi_edge"):
        for name in _imports(path):
            used = name.removeprefix("fumi_core.")
            if used != name and room not in ("app", "program"):
                assert any(used.startswith(each) for each in OF_THE_CORE), f"{path}: imports {name}"


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = {name for name in re.findall(r"`([\w/.]+\.py)`", text) if "NAME" not in name}
    assert len(names) > 30
    everything = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("[ft][ue]*/**/*.py")]
    assert not [name for name in names if not any(f"/{each}".endswith(f"/{name}") for each in everything)]


def test_contributing_names_the_linters_of_continuous_integration() -> None:
    pinned = [re.findall(r"\b(?:ruff|mypy)==[\d.]+", (ROOT / name).read_text()) for name in (".ci/run", "CONTRIBUTING.md")]
    assert pinned[0] == pinned[1] != []
