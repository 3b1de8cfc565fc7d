"""Man pages of both programs, made from their pages in Markdown when the package is built; they are in share/man/man1 of a wheel.

`python3 ops/manpages.py DIRECTORY` writes them there. The tables of flags are those of --help, which a test compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Page(NamedTuple):
    """What a man page is made from: a file, of which it has the first paragraph and all sections."""

    source: str
    about: str
    synopsis: str


PAGES = {
    "fumi-core": Page("fumi_core/PROGRAM.md", "an SMTP server in plaintext, behind a TLS proxy", "[FLAGS] [MODULE:APP]"),
    "fumi-edge": Page("fumi_edge/README.md", "a TLS and STARTTLS proxy for SMTP", "[FLAGS] [MODULE:APP]"),
}
_SPECIAL = str.maketrans({"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti", "…": "..."})
_INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_ITEM = r"(?:-|\d+\.) .*\n(?:  .*\n)*"
_BLOCK = re.compile(rf"```\w*\n(?P<code>[^`]*)```|(?P<table>(?:\|.*\n)+)|(?P<list>(?:{_ITEM})+)|(?P<text>(?:.+\n)+)")


def pages(directory: Path) -> list[Path]:
    """Write the man pages whose sources are there into a directory, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    version = re.search(r'VERSION = "(.+)"', (ROOT / "fumi_core/version.py").read_text("utf-8"))
    made = []
    for name, page in PAGES.items():
        source = ROOT / page.source
        if source.exists():
            made.append(directory / f"{name}.1")
            made[-1].write_text(_page(name, page, source.read_text("utf-8"), version[1] if version else ""), "utf-8")
    return made


def _page(name: str, page: Page, markdown: str, version: str) -> str:
    sections = re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", markdown, re.MULTILINE)
    lines = [
        f'.TH "{name.upper()}" "1" "" "Fumi {version}" "User Commands"',
        *(".SH NAME", f"{_escaped(name)} \\- {_escaped(page.about)}"),
        *(".SH SYNOPSIS", f".B {_escaped(name)}", _escaped(page.synopsis)),
    ]
    about = next(block["text"] for block in _BLOCK.finditer(markdown.partition("\n")[2]) if block["text"])
    lines += [".SH DESCRIPTION", _inline(about)]
    for title, text in sections:
        lines += [f'.SH "{_escaped(title.upper())}"', *_blocks(text)]
    others = [f"\\fB{_escaped(each)}\\fR(1)" for each in PAGES if each != name]
    return "\n".join([*lines, ".SH SEE ALSO", *others]) + "\n"


def _blocks(text: str) -> Iterator[str]:
    """A section's text, in roff (groff_man(7))."""
    for title, part in re.findall(r"(?:^### (.*)\n)?((?:(?!### ).*\n)+)", text, re.MULTILINE):
        if title:
            yield f'.SS "{_inline(title)}"'
        for block in _BLOCK.finditer(part):
            if (code := block["code"]) is not None:
                yield from (".PP", ".RS 4", ".nf", *map(_escaped_line, code.splitlines()), ".fi", ".RE")
            elif block["table"] is not None:
                yield from _table(block["table"])
            elif block["list"] is not None:
                for item in re.findall(_ITEM, block["list"]):
                    mark, _, rest = item.partition(" ")
                    yield from (r".IP \(bu 2" if mark == "-" else f".IP {mark} 3", _inline(rest))
            elif part.startswith("\n| flag", block.end()):
                yield f'.SS "{_inline(block["text"].rstrip(":" + chr(10)))}"'  # the name of a group of flags
            else:
                yield from (".PP", _inline(block["text"]))


def _table(text: str) -> Iterator[str]:
    """A list of its rows: the first cell, and below it the others, with their heads where there are more than two."""
    head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines())
    if head[0] != "flag":
        yield from (".TP", *(f"\\fI{_escaped(cell.replace('`', ''))}\\fR" for cell in head[:2]))
    for first, second, *more in rows:
        named = [f"{name.capitalize()}: {cell}." for name, cell in zip(head[2:], more, strict=True) if cell]
        meaning = f"{second}." if named and second and not second.endswith(".") else second
        yield from (".TP", _inline(first, bold=True), _inline(" ".join([meaning, *named]).strip()) or r"\&")


def _inline(text: str, bold: bool = False) -> str:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(text.split())).replace(r"\|", "|")
    parts, end = [], 0
    for found in _INLINE.finditer(text):
        parts += [_escaped(text[end : found.start()]), f"\\fB{_escaped(found[1] or found[2].replace('`', ''))}\\fR"]
        end = found.end()
    parts.append(_escaped(text[end:]))
    line = "".join(parts)
    return f"\\fB{line}\\fR" if bold and not parts[1:] else _escaped_start(line)


def _escaped(text: str) -> str:
    return text.translate(_SPECIAL)


def _escaped_line(line: str) -> str:
    return _escaped_start(_escaped(line))


def _escaped_start(line: str) -> str:
    """A dot at the start of a line would be a request."""
    return f"\\&{line}" if line.startswith((".", "\\(aq")) or not line else line


try:
    from setuptools.command.build_py import build_py
except ImportError:
    pass  # as a script it needs the standard library only
else:

    class BuildWithManPages(build_py):
        """setuptools' command, which makes the man pages, too, where the package is installed as files."""

        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                found = [str(path.relative_to(ROOT)) for path in pages(ROOT / "build" / "man")]
                self.distribution.data_files = [*(self.distribution.data_files or []), ("share/man/man1", found)]

        def get_source_files(self) -> list[str]:
            sources = [page.source for page in PAGES.values() if (ROOT / page.source).exists()]
            return [*super().get_source_files(), *sources, "ops/manpages.py"]


if __name__ == "__main__":
    for path in pages(Path(sys.argv[1])):
        print(path)
