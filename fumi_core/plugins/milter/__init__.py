"""``milter(address)``: checks mail with a mail filter, by the milter protocol."""

from __future__ import annotations

from fumi_core.plugins.milter.plugin import milter

__all__ = ["milter"]
