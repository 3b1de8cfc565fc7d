"""An SMTP server that is programmed by handlers, as Koa is for HTTP. It speaks plaintext; ``fumi_edge`` adds TLS."""

from fumi_core import plugins, testing
from fumi_core.app import Fumi
from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.handlers.contexts import AuthContext, CloseContext, ConnectContext, DataContext, MailContext, RcptContext
from fumi_core.handlers.hooks import AuthHandler, CloseHandler, ConnectHandler, DataHandler, MailHandler, RcptHandler
from fumi_core.handlers.middleware import Next
from fumi_core.proxy_protocol import TLSInfo
from fumi_core.smtp.options import OptionArguments
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Address, Envelope, Session
from fumi_core.version import VERSION as __version__

__all__ = [
    "Address",
    "AuthContext",
    "AuthHandler",
    "CloseContext",
    "CloseHandler",
    "ConnectContext",
    "ConnectHandler",
    "Credentials",
    "DataContext",
    "DataHandler",
    "Envelope",
    "Fumi",
    "MailContext",
    "MailHandler",
    "MessageAborted",
    "Next",
    "OptionArguments",
    "RcptContext",
    "RcptHandler",
    "SMTPError",
    "Session",
    "TLSInfo",
    "__version__",
    "plugins",
    "testing",
]
