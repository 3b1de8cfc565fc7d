"""The examples of a README: its code blocks, and how to run them here, on free ports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks, each with the language it is said to be in."""
    return _BLOCK.findall(text)


@dataclass
class Section:
    """What stands between a heading and the next."""

    level: int
    title: str
    text: str = ""


def sections(text: str) -> list[Section]:
    """All of them, in order."""
    found: list[Section] = []
    in_block = False
    for line in text.splitlines(keepends=True):
        in_block ^= line.startswith("```")
        if line.startswith("#") and not in_block:
            found.append(Section(len(line.partition(" ")[0]), line.strip("# \n")))
        else:
            found[-1].text += line
    return found


def table(text: str) -> list[list[str]]:
    """The cells of the first table, a row each, without its head; there are some."""
    lines = dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    rows = list(takewhile(lambda line: line.startswith("|"), lines))
    assert len(rows) > 2, "no table"
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def other_ports(text: str, ports: dict[str, int]) -> str:
    """The same commands on ports that are free here, and on this host alone."""
    for port, free in ports.items():
        text = re.sub(rf"(?:127\.0\.0\.1)?:{port}\b", f"127.0.0.1:{free}", text)
        text = re.sub(rf"(?<=listen\(){port}\b", str(free), text)
    return text


def sh(text: str, cwd: Path) -> str:
    """What the commands say on stdout; all of them are to succeed."""
    done = subprocess.run(
        ["sh", "-euc", text], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "PATH": PATH}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
