"""A shell completes the flags of both programs, and files where a flag takes one."""

from __future__ import annotations

import click
import pytest
from click.shell_completion import CompletionItem, ShellComplete

from fumi_core.cli import main as core
from fumi_edge.cli import main as edge

PROGRAMS = {"fumi-core": core, "fumi-edge": edge}


def completed(name: str, *words: str) -> list[CompletionItem]:
    """What a shell offers for the last word."""
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    return ShellComplete(PROGRAMS[name], {}, name, variable).get_completions(list(words[:-1]), words[-1])


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, program in PROGRAMS.items() for option in program.params if isinstance(option, click.Option)],
    ids=lambda value: value if isinstance(value, str) else value.opts[-1],
)
def test_a_flag_completes_what_it_takes(name: str, option: click.Option) -> None:
    flag, metavar = option.opts[-1], option.metavar or ""
    assert flag in [each.value for each in completed(name, flag[:-1])]
    offered = completed(name, flag, "")
    kinds = {"FILE": {"file"}, "DIR": {"dir"}}
    wanted = next((kind for word, kind in kinds.items() if metavar.startswith(word)), {"plain"})
    assert {each.type for each in offered} <= wanted
    assert bool(offered) or wanted == {"plain"}
    if isinstance(option.type, click.Choice):
        assert [each.value for each in offered] == list(option.type.choices)


def test_delivery_targets_are_completed() -> None:
    assert [each.value for each in completed("fumi-core", "--deliver", "")] == ["maildir:", "lmtp:", "smtp:", "discard:"]
    assert [each.value for each in completed("fumi-core", "--deliver", "m")] == ["maildir:"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_settings_that_are_wrong_so_far_do_not_keep_a_shell_from_completing(name: str) -> None:
    assert completed(name, "--config", "missing.toml", "--listen", "nonsense", "--work")[0].value == "--workers"
