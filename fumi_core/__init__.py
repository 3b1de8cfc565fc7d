"""Fumi: a Koa-style SMTP server. It speaks plaintext SMTP; ``fumi_edge`` puts TLS in front of it."""

from fumi_core import plugins, testing
from fumi_core.app import Fumi
from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.smtp.session import Address, Envelope, Session
from fumi_core.version import VERSION as __version__

__all__ = ["Address", "Envelope", "Fumi", "MessageAborted", "SMTPError", "Session", "__version__", "plugins", "testing"]
