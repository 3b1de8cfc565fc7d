"""AUTH in progress (RFC 4954 §4), sans-IO: sends base64 challenges, receives base64 responses, returns credentials."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode

from fumi_core.smtp import replies, sasl
from fumi_core.smtp.options import Options
from fumi_core.smtp.replies import Reply
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Session

# XOAUTH2's clients expect the reason for a failure in a challenge, and send a response to it before they get the 535.
_XOAUTH2_ERROR = b'{"status":"401","schemes":"bearer","scope":"mail"}'


def refusal(session: Session, options: Options, enabled: bool) -> Reply | None:
    """Why this session may not authenticate now; ``enabled`` tells whether AUTH is enabled at all."""
    if not enabled:
        return replies.AUTH_NOT_ENABLED
    if not session.secure and options.require_tls:
        return replies.MUST_STARTTLS
    if not session.secure and not options.allow_insecure_auth:
        return replies.ENCRYPTION_REQUIRED
    return replies.ALREADY_AUTHENTICATED if session.user is not None else None


class AuthExchange:
    """One attempt by one mechanism. It has ended when ``respond()`` gives something other than a 334."""

    __slots__ = ("_steps", "method", "verdict")

    def __init__(self, method: str, name: str) -> None:
        """``name`` is the server's, for challenges that contain it. Raises KeyError for an unknown mechanism."""
        self.method = method
        self._steps = sasl.MECHANISMS[method](name)
        self.verdict: Reply | None = None
        """The reply to the credentials, kept until the client has responded to the challenge that explains it."""

    def begin(self, initial: bytes | None) -> Reply | Credentials:
        """Return the first challenge or, if AUTH had an initial response (``=`` is an empty one), the result of that."""
        challenge = next(self._steps)
        if initial is None:
            return _challenge(challenge)
        if self.method not in sasl.TAKES_INITIAL_RESPONSE:
            return replies.NO_INITIAL_RESPONSE
        return self.respond(b"" if initial == b"=" else initial)

    def respond(self, response: bytes) -> Reply | Credentials:
        """Return the next challenge (334), the credentials, or the rejection."""
        if self.verdict is not None:
            return self.verdict
        if response == b"*":
            return replies.AUTH_ABORTED
        try:
            return _challenge(self._steps.send(b64decode(response, validate=True)))
        except StopIteration as ended:
            credentials: Credentials = ended.value
            return credentials
        except (binascii.Error, sasl.Malformed):
            return replies.AUTH_MALFORMED
        except sasl.BadName:
            return replies.AUTH_BAD_NAME
        except sasl.NotAuthorized:
            return replies.AUTH_FAILED

    def explain(self, verdict: Reply) -> Reply | None:
        """The challenge to send before this rejection, which is then the reply to the next response; None for most mechanisms."""
        if self.method != "XOAUTH2" or verdict.code != 535:
            return None
        self.verdict = verdict
        return _challenge(_XOAUTH2_ERROR)


def _challenge(text: bytes) -> Reply:
    return Reply(334, b64encode(text).decode())
