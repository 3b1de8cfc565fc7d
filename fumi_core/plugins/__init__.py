"""Ready-made plugins: ``app.use(plugins.max_size(10_000_000))``."""

from __future__ import annotations

from fumi_core.plugins.denylist import denylist
from fumi_core.plugins.max_size import max_size
from fumi_core.plugins.rcpt_filter import rcpt_filter
from fumi_core.plugins.require_tls import require_tls
from fumi_core.plugins.sender_block import sender_block

__all__ = ["denylist", "max_size", "rcpt_filter", "require_tls", "sender_block"]
