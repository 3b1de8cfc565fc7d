"""MODULE:APP: imports a module, and takes the app from it; with MODULE:MAKE() the app is what this function returns."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from fumi_core.app import Fumi
from fumi_core.runtime.settings import SettingError


class AppError(SettingError):
    """An app that cannot be loaded. ``files`` are those in which the error may be."""

    def __init__(self, message: str, files: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.files = files


def load_app(reference: str) -> Fumi:
    """Import ``MODULE:APP`` or ``MODULE:MAKE()``; the working directory is searched first. Raises AppError."""
    module, colon, written = reference.partition(":")
    name = written.removesuffix("()")
    if not (module and colon and name):
        raise AppError(f"{reference!r} is not MODULE:APP, as in myapp:app, or MODULE:MAKE(), as in myapp:make()")
    if module.endswith(".py"):
        dotted = ".".join(part for part in module.removesuffix(".py").split("/") if part not in ("", "."))
        raise AppError(f"{reference!r} names a file and not a module: write {dotted}:{written}")
    if "(" in name:
        raise AppError(f"{reference!r}: a function is called without arguments: write {module}:{name.partition('(')[0]}()")
    sys.path.insert(0, os.getcwd())
    try:
        loaded = importlib.import_module(module)
        found = getattr(loaded, name, None)
        app = found if written == name else found() if callable(found) else None
    except (Exception, SystemExit) as error:
        problem = f"{reference}: {type(error).__name__}: {error}{_place_of(error)}"
        raise AppError(problem, (*_candidates(module), *_files_of(error))) from None
    if not isinstance(app, Fumi):
        raise AppError(f"{reference}{_mismatch(module, written, found, app)}", tuple(_candidates(module)))
    return app


def _mismatch(module: str, written: str, found: object, app: object) -> str:
    """What is wrong with something that is not an app, after its reference."""
    name = written.removesuffix("()")
    if found is None:
        return f": {module} has no {name}"
    if inspect.iscoroutine(app):
        app.close()
        return f": {name} is asynchronous; the app is made before there is an event loop"
    if written != name:
        return f" returned a {type(app).__name__}, not a Fumi" if callable(found) else f": {name} is not a function"
    hint = f"; if it returns one, write {module}:{name}()" if callable(found) else ""
    return f" is a {type(app).__name__}, not a Fumi{hint}"


def _candidates(module: str) -> Iterator[str]:
    """The files in which the module is, or would be if it existed."""
    path = Path(os.getcwd(), *module.split("."))
    yield from (f"{path}.py", str(path / "__init__.py"))


def _files_of(error: BaseException) -> Iterator[str]:
    if isinstance(error, SyntaxError) and error.filename:
        yield error.filename
    if isinstance(error, ImportError) and error.name:
        yield from _candidates(error.name)
    yield from (each.filename for each in traceback.extract_tb(error.__traceback__) if os.path.isabs(each.filename))


def _place_of(error: BaseException) -> str:
    """The file and line of the app's own code that raised the error, directly or in a function it called; "" if none did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    above = Path(__file__).parents[2]
    ours = tuple(os.path.join(above, package, "") for package in ("fumi_core", "fumi_edge"))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [each for each in frames if not each.filename.startswith(("<frozen ", importlib.__file__, *ours))]
    return f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
