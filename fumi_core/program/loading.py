"""MODULE:APP: imports a module, and takes the app from it."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from fumi_core.app import Fumi
from fumi_core.runtime.settings import SettingError


def load_app(reference: str) -> Fumi:
    """Import ``MODULE:APP``; the working directory is searched first. Raises SettingError."""
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise SettingError(f"{reference!r} is not MODULE:APP, as in myapp:app")
    if module.endswith(".py"):
        written = ".".join(part for part in module.removesuffix(".py").split("/") if part not in ("", "."))
        raise SettingError(f"{reference!r} names a file and not a module: write {written}:{name}")
    sys.path.insert(0, os.getcwd())
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise SettingError(f"{reference}: {type(error).__name__}: {error} ({_place_of(error)})") from None
    if not hasattr(loaded, name):
        raise SettingError(f"{reference}: {module} has no {name}")
    app = getattr(loaded, name)
    if not isinstance(app, Fumi):
        raise SettingError(f"{reference} is a {type(app).__name__}, not a Fumi")
    return app


def _place_of(error: BaseException) -> str:
    """The file and line of the app's own code that raised the error, directly or in a function it called."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    above = Path(__file__).parents[2]
    ours = tuple(os.path.join(above, package, "") for package in ("fumi_core", "fumi_edge"))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [each for each in frames if not each.filename.startswith(("<frozen ", importlib.__file__, *ours))]
    at = (theirs or frames)[-1]
    return f"{at.filename}:{at.lineno}"
