"""The TLS side of Fumi: terminates TLS and STARTTLS, and sends the backend the client's data by PROXY protocol.

``fumi_edge.Fumi`` is ``fumi_core.Fumi`` with TLS; the other names are those of ``fumi_core`` that an app needs.
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
