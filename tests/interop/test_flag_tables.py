"""The flags that ``--help`` shows are those of the documents: in the same groups, with the same words and defaults."""

from __future__ import annotations

import re

import pytest

from fumi_core.cli import main as core
from fumi_edge.cli import main as edge
from tests.support.readme import ROOT, sections, table

DOCUMENTS = {"fumi-core": (core, "fumi_core/PROGRAM.md", "Command line"), "fumi-edge": (edge, "fumi_edge/README.md", "Flags")}
_TABLE = re.compile(r"^(\w[\w ]*):\n\n(\| flag \| meaning \| default \|\n(?:\|.*\n)+)", re.MULTILINE)


def documented(path: str, title: str) -> dict[str, list[list[str]]]:
    """The rows of each group's table, without code type and links."""
    (text,) = (section.text for section in sections((ROOT / path).read_text()) if section.title == title)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
    return {group: table(rows) for group, rows in _TABLE.findall(text)}


def default_of(help_text: str) -> str:
    found = re.search(r"\[default: \(?([^;\]]*?)\)?[;\]]", help_text)
    return found[1] if found else ""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_tables_of_flags_are_the_groups_of_the_help(name: str) -> None:
    program, path, title = DOCUMENTS[name]
    tables = documented(path, title)
    with program.make_context(name, [], resilient_parsing=True) as context:
        groups = program.groups(context)
        assert list(tables) == list(groups)
        for group, rows in tables.items():
            shown = [option.get_help_record(context) or ("", "") for option in groups[group]]
            assert [row[0] for row in rows] == [re.sub(r"[][]", "", flag) for flag, _ in shown]
            assert [row[2] for row in rows] == [default_of(text) for _, text in shown]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_meaning_of_a_flag_begins_in_its_table_as_in_the_help(name: str) -> None:
    program, path, title = DOCUMENTS[name]
    tables = documented(path, title)
    with program.make_context(name, [], resilient_parsing=True) as context:
        for group, options in program.groups(context).items():
            for option, (flag, meaning, _) in zip(options, tables[group], strict=True):
                assert option.help, flag
                assert option.help.endswith("."), flag
                assert f"{meaning} ".startswith(f"{option.help} "), flag
                assert option.multiple is ("Repeatable" in option.help) is ("Repeatable" in meaning), flag


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_help_has_a_heading_above_each_group(name: str) -> None:
    program = DOCUMENTS[name][0]
    with program.make_context(name, [], resilient_parsing=True) as context:
        text = program.get_help(context)
        for group, options in program.groups(context).items():
            (section,) = re.findall(rf"^{group}:\n((?:  .*\n|  .*\Z)+)", text, re.MULTILINE)
            assert re.findall(r"^  (?:-h, )?(--[a-z-]+)", section, re.MULTILINE) == [option.opts[-1] for option in options]
