"""The version of both programs. ``pyproject.toml`` takes it from here, so no installed metadata is read at run time."""

VERSION = "0.2.0"
