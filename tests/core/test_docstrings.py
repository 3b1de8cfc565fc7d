"""The public API is documented where ``help()`` looks: every module, class, function and property, and what a session holds."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

import fumi_core
from fumi_core import plugins, proxy_protocol, testing
from fumi_core.handlers.stream import MessageStream
from fumi_core.smtp.session import Session


def members(kind: type) -> list[tuple[str, object]]:
    """What the class itself defines in public, constants excepted."""
    return [
        (f"{kind.__name__}.{name}", value)
        for name, value in vars(kind).items()
        if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
    ]


@pytest.mark.parametrize("module", [fumi_core, plugins, proxy_protocol, testing], ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module: ModuleType) -> None:
    public = [name for name in getattr(module, "__all__", dir(module)) if not name.startswith("_")]
    found = [(name, getattr(module, name)) for name in public]
    own = [(name, value) for name, value in found if getattr(value, "__module__", "").startswith("fumi_core")]
    own += [member for _, value in own if inspect.isclass(value) for member in members(value)]
    assert own
    undocumented = [name for name, value in own if callable(value) or isinstance(value, property) if not value.__doc__]
    assert undocumented == []
    assert module.__doc__


def test_every_attribute_of_a_session_has_a_docstring() -> None:
    assert [name for name in dir(Session) if not name.startswith("_") if not inspect.getdoc(getattr(Session, name))] == []


def test_every_method_of_the_stream_has_a_docstring() -> None:
    assert [name for name, value in members(MessageStream) if not inspect.getdoc(value)] == []
