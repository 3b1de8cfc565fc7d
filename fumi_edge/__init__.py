"""The TLS side of Fumi: terminates TLS and STARTTLS and tells the SMTP server behind it, by PROXY protocol, who the client is.

``fumi_edge.Fumi`` is ``fumi_core.Fumi`` with TLS; the names that an app needs besides are those of ``fumi_core``.
"""

from fumi_core import (
    Address,
    AuthContext,
    AuthHandler,
    CloseContext,
    CloseHandler,
    ConnectContext,
    ConnectHandler,
    Credentials,
    DataContext,
    DataHandler,
    Envelope,
    MailContext,
    MailHandler,
    MessageAborted,
    Next,
    OptionArguments,
    RcptContext,
    RcptHandler,
    Session,
    SMTPError,
    TLSInfo,
    plugins,
    testing,
)
from fumi_edge.app import Fumi

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
    "plugins",
    "testing",
]
