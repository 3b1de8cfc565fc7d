"""How both programs read their settings: flags, then environment variables, then ``--config FILE.toml``, then defaults.

A reload reads them as if the program were started now: with the flags and environment of its start, and the files' new content.

A wrong setting is one line on stderr and exit status 2, as with click.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

import click

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.flag_groups import GroupedCommand
from fumi_core.runtime.streams import complete

_ARGUMENTS = "fumi.arguments"
"""The key in a context's meta of the arguments of the start."""
ACTIONS = frozenset(("--check", "--dev", "--emit", "--hash-password", "--help", "--reload", "--version"))
"""Flags that choose an action for one run. They are not settings, so neither a variable nor a configuration key can give them."""
_IMAGE_TAG = "VERSION"
"""FUMI_EDGE_VERSION commonly holds an image's tag, so it is ignored and not an unknown variable."""

CONFIGURATION_OK = "configuration OK"
"""Printed by --check when everything is valid."""
_KUBERNETES_VARIABLE = re.compile(
    r"(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT=\w+://.*|PORT_\d+_[A-Z]+=\w+://.*|PORT_\d+_[A-Z]+_(ADDR|PORT|PROTO)=.*)"
)
"""Variables that Kubernetes sets for a Service with the program's name. FUMI_EDGE_PORT=465 is not one of them."""
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}
"""What both programs tell click; the width is that of ``--help``, in characters."""


class Program(GroupedCommand):
    """A command: errors are one line on stderr, exit status 2. Settings, but not actions, may be environment variables."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        extra["context_settings"] = {**_CONTEXT, **(extra.get("context_settings") or {})}
        super().__init__(*args, **extra)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.help = "Prints the flags and exits."
        return option

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        for param in params:
            if isinstance(param, click.Option) and not ACTIONS.isdisjoint(param.opts):
                param.allow_from_autoenv = False
        return params

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **extra: Any) -> click.Context:
        arguments = list(args)  # click removes them one by one
        ctx = super().make_context(info_name, args, *others, **extra)
        ctx.meta[_ARGUMENTS] = arguments
        return ctx

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError:
            # An invalid variable may be the cause.
            self._check_variables(ctx)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        self._check_variables(ctx)
        return super().invoke(ctx)

    def _check_variables(self, ctx: click.Context) -> None:
        """Raises SettingError for an unknown variable: a misspelt name, such as one for --require-tls, would have no effect."""
        prefix = f"{ctx.auto_envvar_prefix}_"
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        actions = {name: option for option in options for name in _names(option) if not ACTIONS.isdisjoint(option.opts)}
        known = {str(option.name).upper() for option in options} - set(actions)
        for variable in sorted(each for each in os.environ if each.startswith(prefix)):
            name, value = variable.removeprefix(prefix), os.environ[variable]
            if name in actions:
                if name != _IMAGE_TAG:
                    flag = actions[name].opts[-1]
                    raise SettingError(f"variable {variable}: {flag} is not a setting; give it on the command line")
            elif name in known:
                if "\r" in value:
                    raise SettingError(f"variable {variable} contains a carriage return: save its file with Unix line ends")
            elif not _KUBERNETES_VARIABLE.fullmatch(f"{name}={value}"):
                hint = nearest(name, known, prefix) or "every flag in --help can be a variable"
                raise SettingError(f"unknown variable {variable}: {hint}")

    def main(self, *args: Any, **extra: Any) -> Any:
        complete()
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"Error: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except click.Abort:
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)


def _names(option: click.Option) -> set[str]:
    """The variables for this option, without the prefix: by the option's name and by each of its spellings."""
    return {str(option.name).upper(), *(each.lstrip("-").replace("-", "_").upper() for each in option.opts)}


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str | None:
    """A question about the known name that resembles this one most, or None."""
    near = difflib.get_close_matches(name, known, 1)
    return f"is it {prefix}{near[0]}?" if near else None


def read_again(ctx: click.Context) -> click.Context:
    """The settings as they would be if the program were started now. Raises ClickException for an invalid one."""
    return ctx.command.make_context(ctx.info_name, list(ctx.meta[_ARGUMENTS]))


def given(ctx: click.Context) -> set[str]:
    """The names of the settings that were set explicitly, by flag, variable or file."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}


class SettingError(click.ClickException):
    """An invalid setting: one line on stderr, exit status 2."""

    exit_code = 2


def check_mode(mode: int | None, addresses: Iterable[SocketAddress]) -> None:
    """Raises SettingError for a --socket-mode if this program creates no Unix socket."""
    if mode is not None and all(each.kind != "unix" for each in addresses):
        raise SettingError("--socket-mode is for Unix listeners: listen on unix:/path, or remove it")
