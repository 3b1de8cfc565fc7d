"""The lines of a template, each with the name by which a writer knows it.

In HAProxy's template the names are marks: ``#: name`` at the end of a line names that line, and on a line of its own it names
all lines up to ``#: end``. In stunnel's, which has no comments at the end of a line, an option is the name of its line. Writers
look at names and never at comments, so rewording a comment changes nothing but that comment.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from typing import NamedTuple

_PARTS = re.compile(r'(?P<setting>(?:[^"#]|"[^"]*")*?)\s*(?:#(?:: (?P<mark>[\w-]+)$)?.*)?')
"""A line of an HAProxy file. A # between quotes does not begin a comment."""


class Line(NamedTuple):
    text: str
    """Without the mark."""
    name: str = ""
    comment: bool = False


def haproxy_template() -> list[Line]:
    return list(_marked(_body("haproxy.cfg", "#")))


def stunnel_template() -> tuple[list[Line], list[Line]]:
    """The lines for all services, and those of the one service."""
    lines = [Line(text, text.partition(" = ")[0], comment=text.startswith(";")) for text in _body("stunnel.conf", ";")]
    header = lines.index(Line("[smtps]", "[smtps]"))
    return lines[:header], lines[header + 1 :]


def without(lines: Iterable[Line], unwanted: Callable[[str], bool]) -> list[Line]:
    """Without the lines of these names, and without the comments directly above them."""
    kept: list[Line] = []
    for line in lines:
        if not unwanted(line.name):
            kept.append(line)
            continue
        while kept and kept[-1].comment:
            kept.pop()
    return kept


def _body(file: str, sign: str) -> Iterator[str]:
    """A file without the comment at its top, which is about the file."""
    lines = (files("fumi_edge") / "templates" / file).read_text("utf-8").splitlines()
    return itertools.dropwhile(lambda line: not line or line.startswith(sign), lines)


def _marked(lines: Iterable[str]) -> Iterator[Line]:
    block = ""
    for line in lines:
        parts = _PARTS.fullmatch(line)
        assert parts is not None, line
        setting, mark = parts.group("setting", "mark")
        if setting or not line:
            yield Line(setting, mark or block)
        elif mark:
            block = "" if mark == "end" else mark
        else:
            yield Line(line, block, comment=True)
