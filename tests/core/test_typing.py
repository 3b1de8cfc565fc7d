"""The names and types that apps are written with. What mypy must accept and what it must find is in ``tests/typing``."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import fumi_core
import fumi_edge
from fumi_core import Fumi
from fumi_core.smtp.option_values import Choice
from fumi_core.smtp.options import DECLARATIONS, OptionArguments, Options, Strings

ROOT = Path(__file__).parents[2]
OPTIONS = get_type_hints(Options)
ARGUMENTS = get_type_hints(OptionArguments)


def test_the_option_arguments_are_the_options_in_the_same_order() -> None:
    assert list(ARGUMENTS) == list(DECLARATIONS)
    assert not OptionArguments.__required_keys__


@pytest.mark.parametrize("option", DECLARATIONS)
def test_an_option_argument_has_the_type_of_its_option(option: str) -> None:
    kind: type | UnionType = ARGUMENTS[option]
    if kind == Strings:
        kind = tuple[str, ...]
    elif get_origin(kind) is Literal:
        kind = str
    assert kind == OPTIONS[option]


def read(option: str, value: Any) -> Any:
    """The option of an app to which it was given."""
    given: dict[str, Any] = {option: value}
    return getattr(Fumi(**given).options, option)


def test_an_option_argument_with_a_choice_has_the_values_that_are_accepted() -> None:
    types = {option: get_args(kind) for option, kind in ARGUMENTS.items() if get_origin(kind) is Literal}
    checks = {each.name: each.check.values for each in DECLARATIONS.values() if isinstance(each.check, Choice)}
    assert types == checks
    for option, values in types.items():
        assert [read(option, value) for value in values] == list(values)


def test_several_strings_may_be_a_list_a_tuple_or_a_set() -> None:
    for option in (option for option, kind in ARGUMENTS.items() if kind == Strings):
        default = getattr(Options(), option)
        for strings in (list(default), tuple(default), set(default), frozenset(default)):
            assert set(read(option, strings)) == set(default)


def test_the_edge_exports_the_names_that_the_core_exports() -> None:
    assert set(fumi_core.__all__) - set(fumi_edge.__all__) == {"__version__"}
    for name in fumi_edge.__all__:
        assert name == "Fumi" or getattr(fumi_edge, name) is getattr(fumi_core, name)


def test_an_app_that_a_type_checker_accepts_can_be_made() -> None:
    app = runpy.run_path(str(ROOT / "tests" / "typing" / "core_app.py"))["app"]
    assert type(app) is Fumi
    assert app.options.auth_optional


def test_the_type_checker_reads_the_apps_and_reports_a_mistake_that_it_no_longer_finds() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert "tests" in settings["files"]
    assert settings["strict"]
