"""``dovecot_auth(address)``: checks logins with Dovecot, on its ``auth-client`` socket."""

from __future__ import annotations

import contextlib
import logging
from base64 import b64encode
from collections.abc import Iterator
from ipaddress import ip_address

from fumi_core.app import Fumi
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import AuthContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins.dovecot.channel import Channel, Request, TooLong, Unavailable, server_address
from fumi_core.plugins.dovecot.protocol import AuthConversation, Conversation, DovecotReply
from fumi_core.runtime.logs import event
from fumi_core.smtp.replies import TEMPORARY_AUTH_FAILURE
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Session

METHODS = ("PLAIN", "LOGIN", "XOAUTH2")
"""The mechanisms that Dovecot may check."""
MAX_REASON = 200
"""Characters of Dovecot's reason for a failure that are sent to the client."""
_log = logging.getLogger("fumi.core")
_FAILED = "5.7.8 Error: authentication failed"


def dovecot_auth(address: str) -> DovecotAuth:
    """Check PLAIN, LOGIN and XOAUTH2 with the Dovecot whose ``auth-client`` socket is at ``address``: unix:/path or HOST:PORT.

    ``session.user`` is the user name that Dovecot returns. AUTH is answered ``454 4.7.0`` when Dovecot has a temporary
    failure, cannot be reached or does not answer within 30 seconds, and ``535 5.7.8`` if the login fails. Mechanisms that Dovecot
    did not offer when it was last connected are not offered. Raises ValueError for an invalid address.
    """
    return DovecotAuth(address)


class DovecotAuth:
    """The plugin. Each process has one connection to Dovecot."""

    def __init__(self, address: str) -> None:
        self._channel = Channel(server_address("dovecot_auth", address), AuthConversation)

    def __call__(self, app: Fumi) -> None:
        app.on_auth(self._authenticate)
        app.withhold(self._not_offered, take=True)
        app.at_listen(self._fetch_mechanisms)
        app.at_close(self._channel.close)

    async def _fetch_mechanisms(self) -> None:
        try:
            await self._channel.connect()
        except Unavailable as error:
            self._channel.failed(error)

    def _not_offered(self) -> frozenset[str]:
        offered = self._channel.mechanisms
        if offered is None:
            return frozenset()
        return frozenset(f"AUTH {method}" for method in METHODS if _equivalent(method, offered) is None)

    async def problem(self) -> str | None:
        """Why Dovecot cannot be reached, for ``--check``; None when it can."""
        try:
            await self._channel.connect()
        except Unavailable as error:
            return str(error)
        finally:
            self._channel.close()
        return None

    async def _authenticate(self, ctx: AuthContext, next: Next) -> None:
        credentials = ctx.credentials
        if credentials.method not in METHODS or "\0" in credentials.password:
            return  # Dovecot would take a NUL for the password's end
        try:
            reply = await self._channel.request(lambda server: _request(ctx.session, credentials, server))
            ctx.accept(user_of(reply))
        except TooLong:
            return
        except Unavailable:
            raise SMTPError(*TEMPORARY_AUTH_FAILURE) from None
        except UnusableReply as error:
            words = "unusable reply from Dovecot"
            event(_log, logging.ERROR, words, id=ctx.session.id, address=self._channel.address, error=error)
            raise SMTPError(*TEMPORARY_AUTH_FAILURE) from None


class UnusableReply(Exception):
    """Dovecot has accepted a login that this server cannot accept; the message says why."""


def user_of(reply: DovecotReply) -> str:
    """The name of the user that may log in. Raises SMTPError for a refusal, UnusableReply."""
    if reply.verb == "FAIL":
        if reply.has("temp") or reply.value("code") == "temp_fail":
            raise SMTPError(*TEMPORARY_AUTH_FAILURE)
        raise _failure(reply)
    if reply.has("nologin"):
        raise _failure(reply)  # the password is right, but the account must not be used
    if reply.has("proxy"):
        # The password may not have been checked: the server that Dovecot names does that.
        raise UnusableReply("the user is to be proxied to another server, which is not supported")
    user = reply.value("user")
    if not user or not user.isprintable():
        raise UnusableReply("a login was accepted without a valid user name")
    return user


def _failure(reply: DovecotReply) -> SMTPError:
    reason = " ".join((reply.value("reason") or "").split())[:MAX_REASON]
    return SMTPError(f"{_FAILED}: {reason}" if reason else _FAILED, 535)


def _request(session: Session, credentials: Credentials, server: Conversation) -> Request:
    """AUTH for these credentials. Raises SMTPError when the server does not have the mechanism."""
    mechanism = _equivalent(credentials.method, server.mechanisms)
    if mechanism is None:
        raise SMTPError("5.5.4 Unrecognized authentication type", 504)
    initial, *more = (b64encode(each).decode() for each in _responses(mechanism, credentials))
    return Request("AUTH", (mechanism, *_facts(session), f"resp={initial}"), more)


def _equivalent(method: str, offered: frozenset[str]) -> str | None:
    """The mechanism to use with a server that offers these: LOGIN and PLAIN carry the same, and Dovecot has PLAIN by default."""
    usable = {"LOGIN": ("LOGIN", "PLAIN"), "PLAIN": ("PLAIN", "LOGIN")}.get(method, (method,))
    return next((each for each in usable if each in offered), None)


def _responses(mechanism: str, credentials: Credentials) -> tuple[bytes, ...]:
    """The initial response, and those to the server's challenges."""
    user, password = credentials.username.encode(), credentials.password.encode()
    if mechanism == "PLAIN":
        return (b"\0%b\0%b" % (user, password),)
    if mechanism == "LOGIN":
        return user, password
    # Dovecot explains a failure in a challenge, which the client answers before it gets the failure.
    return b"user=%b\x01auth=Bearer %b\x01\x01" % (user, credentials.access_token.encode()), b""


def _facts(session: Session) -> Iterator[str]:
    """Parameters that describe the connection to Dovecot."""
    yield "service=smtp"
    if session.secure:
        yield "secured"
    for name, address, port in (
        ("l", session.local_address, session.local_port),
        ("r", session.remote_address, session.remote_port),
    ):
        with contextlib.suppress(ValueError):  # a Unix socket has no address
            yield f"{name}ip={ip_address(address)}"
            if port:
                yield f"{name}port={port}"
