"""Ready-made plugins: ``app.use(plugins.max_size(10_000_000))``. They run in the order in which they are used."""

from __future__ import annotations

from fumi_core.plugins.allowlist import allowlist
from fumi_core.plugins.denylist import denylist
from fumi_core.plugins.dnsbl import dnsbl
from fumi_core.plugins.dovecot.auth import dovecot_auth
from fumi_core.plugins.dovecot.users import dovecot_users
from fumi_core.plugins.greylist import greylist
from fumi_core.plugins.logger import logger
from fumi_core.plugins.max_size import max_size
from fumi_core.plugins.milter import milter
from fumi_core.plugins.rate_limit import rate_limit
from fumi_core.plugins.rcpt_filter import rcpt_filter
from fumi_core.plugins.require_tls import require_tls
from fumi_core.plugins.sender_block import sender_block
from fumi_core.plugins.sender_login import sender_login

__all__ = [
    "allowlist",
    "denylist",
    "dnsbl",
    "dovecot_auth",
    "dovecot_users",
    "greylist",
    "logger",
    "max_size",
    "milter",
    "rate_limit",
    "rcpt_filter",
    "require_tls",
    "sender_block",
    "sender_login",
]
