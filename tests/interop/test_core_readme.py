"""Every example of fumi_core's pages does what stands there, and their tables are those of the code.

A Python block is run, and written to a file if its first line names one; a dialogue is held with the ``app`` of the last one; a
shell block is run, servers in the background; text is what came of the blocks before it. Examples for the servers of others are
passed over. A chapter has one directory, a section its own ports.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import re
import shutil
import socket
import sys
import unittest.mock
from collections.abc import Iterable, Iterator
from typing import Any, get_type_hints

import pytest
from prometheus_client import CollectorRegistry

import fumi_core
import fumi_edge
from fumi_core import Fumi, SMTPError, plugins
from fumi_core.delivery import TARGETS
from fumi_core.handlers import contexts
from fumi_core.handlers.stream import MessageStream
from fumi_core.proxy_protocol import TLSInfo
from fumi_core.runtime.process_metrics import register_process_metrics
from fumi_core.runtime.scoreboard import Scoreboard
from fumi_core.runtime.totals import register_restarts
from fumi_core.server.metrics import CoreMetrics
from fumi_core.server.setup import PHASES
from fumi_core.smtp.option_values import Choice
from fumi_core.smtp.options import DECLARATIONS, Declaration, Options
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Address, Envelope, Session
from fumi_core.smtp.tally import Tally
from fumi_core.testing import running
from tests.support.certificates import CertificateFiles
from tests.support.dialogue import talk
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.readme import PATH, ROOT, Section, blocks, other_ports, sections, sh, table
from tests.support.starter import Process
from tests.support.waiting import until

PAGES = ("README.md", "PROGRAM.md", "MIGRATING.md")
SECTIONS = [section for page in PAGES for section in sections((ROOT / "fumi_core" / page).read_text())]
CONTEXTS: tuple[type[contexts.Context], ...] = (
    contexts.ConnectContext,
    contexts.AuthContext,
    contexts.MailContext,
    contexts.RcptContext,
    contexts.DataContext,
    contexts.CloseContext,
)
PORTS = ("2525", "2526", "2424", "9525")


class Examples:
    """Runs the blocks of a section."""

    def __init__(self, title: str, programs: Programs) -> None:
        self.title = title
        self.programs = programs
        self.ports = {port: free_port() for port in PORTS}
        self.app: Fumi | None = None
        self.said = ""
        self.commands = ""
        self.servers: list[Process] = []

    def run(self, kind: str, source: str) -> None:
        if kind not in ("js", "ts") and "aiosmtpd.controller" not in source:
            getattr(self, f"run_{kind}")(source if kind in ("smtp", "text") else other_ports(source, self.ports))

    def run_python(self, source: str) -> None:
        self._write(source, "py")
        self.said = self.commands = ""
        namespace: dict[str, Any] = {"__name__": "example"}
        with self._listening():
            exec(compile(source, self.title, "exec"), namespace)
        self.app = namespace.get("app")

    def run_toml(self, source: str) -> None:
        self._write(source, "toml")

    def run_smtp(self, dialogue: str) -> None:
        assert self.app is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._listening())
            server = stack.enter_context(running(self.app))
            sock = stack.enter_context(socket.create_connection((server.host, server.port), timeout=30))
            talk(sock, dialogue.splitlines(), self.title, _no_other)

    def run_sh(self, source: str) -> None:
        servers = [line for line in source.splitlines() if _is_server(line)]
        for command in servers:
            self._serve(command)
        self.commands = "" if servers else source
        self._again()

    def run_text(self, expected: str) -> None:
        pattern = re.compile(".*?".join(map(re.escape, expected.split("…"))) + r"\s*", re.DOTALL)
        # The last line of a log may be written when the client is gone already.
        if self.commands and not pattern.fullmatch(self.said):
            until(lambda: pattern.fullmatch(self._again()), f"{self.title}: {self.said!r} becoming {expected!r}")
        assert pattern.fullmatch(self.said), f"{self.title}: {self.said!r} is not {expected!r}"

    def _again(self) -> str:
        self.said = sh(self.commands, self.programs.directory)
        return self.said

    def _write(self, source: str, suffix: str) -> None:
        if named := re.match(rf"# (\w+\.{suffix})\n", source):
            (self.programs.directory / named[1]).write_text(source)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """What is printed is added to what was said."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
            yield
        self.said += output.getvalue().replace("\r\n", "\n")

    def _serve(self, command: str) -> None:
        ports = [port for port in self.ports.values() if f":{port}" in command] or [self.ports["2525"]]
        server = self.programs.start("sh", "-c", f"PATH={PATH} exec {command}", port=ports[0])
        self.servers.append(server)
        for port in ports:
            self.programs.await_port(port, server)

    def stop(self) -> None:
        """The servers, last first; they end well."""
        assert [self.programs.stop(server) for server in reversed(self.servers)] == [0] * len(self.servers), self.title


def _is_server(command: str) -> bool:
    return command == "python serve.py" or (command.startswith("fumi-core") and not command.endswith("--check"))


def _no_other(where: str, line: str) -> None:
    raise AssertionError(f"{where}: {line!r} is no line of a dialogue")


def _chapters() -> dict[str, list[Section]]:
    found: dict[str, list[Section]] = {}
    for section in SECTIONS:
        if section.level <= 2:
            chapter = found[section.title] = list[Section]()
        chapter.append(section)
    return {title: chapter for title, chapter in found.items() if any(blocks(section.text) for section in chapter)}


@pytest.mark.parametrize("chapter", _chapters().values(), ids=_chapters())
def test_the_examples_do_what_stands_there(
    chapter: list[Section], programs: Programs, certificate: CertificateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in certificate:
        shutil.copy(path, programs.directory)
    monkeypatch.chdir(programs.directory)
    monkeypatch.syspath_prepend(programs.directory)
    with unittest.mock.patch.dict(sys.modules):  # without the examples' own, afterwards
        for section in chapter:
            examples = Examples(section.title, programs)
            for kind, source in blocks(section.text):
                examples.run(kind, source)
            examples.stop()


# The tables


def _table(title: str, head: str = "") -> list[list[str]]:
    """The rows of a section's table, the first or that with this head."""
    (text,) = (section.text for section in SECTIONS if section.title == title)
    return table(text[text.index(head) :])


def _names(cells: Iterable[str]) -> list[str]:
    """What stands in code type, without arguments."""
    return [name.partition("(")[0] for cell in cells for name in re.findall("`([^`]+)`", cell)]


def test_the_table_of_options_is_that_of_their_declarations() -> None:
    rows = [[cell.replace("`", "") for cell in row] for row in _table("Options")]
    assert rows == [[each.name, _type(each), _default(each), each.meaning] for each in DECLARATIONS.values()]


def _type(option: Declaration) -> str:
    return " | ".join(f'"{value}"' for value in option.check.values) if isinstance(option.check, Choice) else option.type


def _default(option: Declaration) -> str:
    return "this host's" if option.name == "name" else repr(option.default).replace("'", '"')


def test_the_table_of_hooks_is_theirs() -> None:
    rows = _table("Handlers")
    assert _names(row[0] for row in rows) == [f"on_{phase}" for phase in PHASES]
    for row, context in zip(rows, CONTEXTS, strict=True):
        public = {name for name in dir(context) if not name.startswith(("_", "default_"))} - {"session", "reject"}
        # What a handler's verdict is kept in, and what its errors are logged by, is the server's.
        assert set(_names([row[2]])) == public - {"accepted", "rejected", "user", "hook", "command"}
        if context is not contexts.CloseContext:
            assert row[3].startswith(str(context.default_code))


def test_the_table_of_types_is_theirs() -> None:
    rows = [[cell.strip("`") for cell in row] for row in _table("Types")]
    assert [row[:2] for row in rows] == [[kind.hook, kind.__name__] for kind in CONTEXTS]
    for hook, context, handler in rows:
        assert get_type_hints(getattr(Fumi, hook))["return"].__bound__ == getattr(fumi_core, handler)
        assert get_type_hints(getattr(fumi_core, handler).__call__)["ctx"] is getattr(fumi_core, context)


def test_the_tables_of_the_session_are_its_own() -> None:
    for head, kind in (("session.", Session), ("session.envelope.", Envelope), ("session.tls.", TLSInfo)):
        rows = _table("The session", f"| `ctx.{head}` |")
        assert set(_names(row[0] for row in rows)) == {name for name in dir(kind) if not name.startswith("_")}


def test_the_table_of_the_stream_is_its_own() -> None:
    rows = _table("The message")
    said = {name for row in rows for name in re.findall(r"ctx\.stream\.(\w+)", row[0])}
    servers = {"abort", "discard", "end", "exceed", "feed", "full", "has_text", "refusal", "release", "spool", "message"}
    assert said == {name for name in dir(MessageStream) if not name.startswith("_")} - servers


def test_the_table_of_plugins_is_theirs() -> None:
    rows = _table("Plugins")
    assert sorted(_names(row[0] for row in rows)) == sorted(plugins.__all__)
    for (call,) in (re.findall("`([^`]+)`", row[0]) for row in rows):
        name, _, arguments = call.rstrip(")").partition("(")
        taken = inspect.signature(getattr(plugins, name)).parameters.values()
        positional = [each.name for each in taken if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert arguments.split(", ") == (positional or [""]), call


def test_the_table_of_targets_is_theirs() -> None:
    assert sorted(name.partition(":")[0] for row in _table("Delivery") for name in _names([row[0]])) == sorted(TARGETS)


def test_the_table_of_metrics_is_theirs() -> None:
    registry = CollectorRegistry()
    CoreMetrics(registry, Tally(), TARGETS)
    register_process_metrics(registry)
    register_restarts(registry, "fumi_core", Scoreboard(1))
    real = {
        family.name + "_total" * (family.type == "counter"): {
            label: {sample.labels[label] for sample in family.samples} for label in family.samples[0].labels if label != "le"
        }
        for family in registry.collect()
    }
    rows = [(*row[0].strip("`").rstrip("}").partition("{"), row[1]) for row in _table("Metrics")]
    assert {name for name, *_ in rows} == set(real)
    for name, _, labels, counts in rows:
        assert labels.split(",") == (list(real[name]) or [""]), name
        # Values that the table names are those of the last label; there are none that it does not name.
        if labels and (named := re.findall(r"`(\w+)`", counts.partition(": ")[2])):
            assert set(named) == real[name][labels.split(",")[-1]], name


KNOWN = {
    name
    for kind in (fumi_edge.Fumi, Options, Session, Envelope, TLSInfo, Credentials, MessageStream, Address, plugins, *CONTEXTS)
    for name in dir(kind)
}
CALLS = (
    *(fumi_edge.Fumi, Fumi.listen, Fumi.use, SMTPError, contexts.Context.reject),
    *(plugins.denylist, plugins.sender_block, plugins.max_size),
)
PARAMETERS = {name for call in CALLS for name in inspect.signature(call).parameters}
WORDS = {
    *keyword.kwlist,
    "app",
    "ctx",
    "running",
    "Fumi",
    "SMTPError",
    "fumi",
    "core",
    "edge",
    "fumi_edge",
    "plugins",
    "package",
    "deliver",
    *TARGETS,
}


@pytest.mark.parametrize("title", ["From aiosmtpd", "From smtp-server for Node", "From Fumi for Bun"])
def test_the_replacements_of_other_libraries_names_exist(title: str) -> None:
    for _, new in _table(title):
        for span in re.findall("`([^`]+)`", new):
            words = set(re.findall(r"[A-Za-z_]\w*", re.sub(r'"[^"]*"', "", span)))
            assert words <= KNOWN | PARAMETERS | WORDS, span
