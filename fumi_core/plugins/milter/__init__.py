"""``milter(address)``: asks a mail filter that speaks the milter protocol."""

from __future__ import annotations

from fumi_core.plugins.milter.plugin import milter

__all__ = ["milter"]
