"""AUTH: each mechanism as its RFC has it, and everything a client can do wrong in between."""

from __future__ import annotations

import hmac
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import pytest

from fumi_core import AuthContext, Fumi, Next
from fumi_core.testing import running
from tests.core.client import Connect


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


Make = Callable[..., tuple[Fumi, list[Any]]]


@pytest.fixture
def make() -> Make:
    """An app that knows one user, and the sessions and credentials that it saw."""

    def build(**options: Any) -> tuple[Fumi, list[Any]]:
        methods = ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2")
        app = Fumi(
            **{"auth_methods": methods, "allow_insecure_auth": True, "name": "mx.example", "close_timeout": 0.2, **options}
        )
        seen: list[Any] = []

        @app.on_auth
        async def auth(ctx: AuthContext, next: Next) -> None:
            seen.append(ctx.credentials)
            if ctx.credentials.username == "joe" and (
                ctx.credentials.validate_password("secret") or ctx.credentials.access_token == "token"
            ):
                ctx.accept({"name": "joe"})
            elif ctx.credentials.username == "banned":
                ctx.reject("Account disabled")

        return app, seen

    return build


OK = b"235 2.7.0 Authentication successful\r\n"
FAILED = b"535 5.7.8 Error: authentication failed\r\n"
BEARER = "user=joe\x01auth=Bearer %s\x01\x01"


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (["AUTH PLAIN " + b64("\0joe\0secret")], [OK]),
        (["auth plain " + b64("joe\0joe\0secret")], [OK]),
        (["AUTH PLAIN " + b64("admin\0joe\0secret")], [FAILED]),
        (["AUTH PLAIN", b64("\0joe\0secret")], [b"334 \r\n", OK]),
        (["AUTH PLAIN " + b64("\0joe\0wrong")], [FAILED]),
        (["AUTH PLAIN " + b64("\0banned\0x")], [b"535 5.7.8 Account disabled\r\n"]),
        (["AUTH LOGIN", b64("joe"), b64("secret")], [b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n", OK]),
        (["AUTH LOGIN " + b64("joe"), b64("secret")], [b"334 UGFzc3dvcmQ6\r\n", OK]),
        (["AUTH LOGIN " + b64("joe"), b64("wrong")], [b"334 UGFzc3dvcmQ6\r\n", FAILED]),
        (["AUTH XOAUTH2 " + b64(BEARER % "token")], [OK]),
        (["AUTH XOAUTH2", b64(BEARER % "token")], [b"334 \r\n", OK]),
        (["AUTH PLAIN ="], [b"501 5.5.2 Cannot decode response\r\n"]),
        (["AUTH PLAIN", "*"], [b"334 \r\n", b"501 5.7.0 Authentication aborted\r\n"]),
        (["AUTH PLAIN", "!!!"], [b"334 \r\n", b"501 5.5.2 Cannot decode response\r\n"]),
        (["AUTH PLAIN " + b64("\0joe")], [b"501 5.5.2 Cannot decode response\r\n"]),
        (["AUTH PLAIN " + b64("\0\0secret")], [b"501 5.5.2 Cannot decode response\r\n"]),
        (["AUTH CRAM-MD5 " + b64("joe x")], [b"501 5.7.0 This mechanism takes no initial response\r\n"]),
        (["AUTH"], [b"501 5.5.4 Syntax: AUTH mechanism\r\n"]),
        (["AUTH SCRAM-SHA-1"], [b"504 5.5.4 Unrecognized authentication type\r\n"]),
        (["AUTH XOAUTH2 " + b64("user=joe\x01auth=Basic x\x01\x01")], [b"501 5.5.2 Cannot decode response\r\n"]),
    ],
)
def test_an_exchange_is_answered(make: Make, connect: Connect, said: list[str], heard: list[bytes]) -> None:
    app, _ = make()
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert [client.say(line) for line in said] == heard
        assert client.say("NOOP") == b"250 2.0.0 Ok\r\n"


@pytest.mark.parametrize(("password", "answer"), [("secret", OK), ("wrong", FAILED)])
def test_cram_md5_proves_a_password_without_showing_it(make: Make, connect: Connect, password: str, answer: bytes) -> None:
    app, seen = make()
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        challenge = b64decode(client.say("AUTH CRAM-MD5").split()[1])
        digest = hmac.new(password.encode(), challenge, "md5").hexdigest()
        assert client.say(b64(f"joe {digest}")) == answer
    assert (seen[0].method, seen[0].username, seen[0].password) == ("CRAM-MD5", "joe", "")


def test_a_cram_md5_digest_that_is_no_digest_is_a_wrong_password(
    make: Make, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = make()
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.say("AUTH CRAM-MD5")
        assert client.say(b64("joe dïgest")) == FAILED
    assert caplog.text == ""


def test_a_rejected_xoauth2_client_gets_the_reason_first(make: Make, connect: Connect) -> None:
    app, _ = make()
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        challenge = client.say("AUTH XOAUTH2 " + b64(BEARER % "stale"))
        assert challenge.startswith(b"334 ")
        assert b'"status":"401"' in b64decode(challenge.split()[1])
        assert client.say("") == FAILED


def test_auth_is_offered_where_it_would_be_accepted(make: Make, connect: Connect) -> None:
    for insecure, tls, offered in ((True, False, True), (False, False, False), (False, True, True)):
        app, _ = make(allow_insecure_auth=insecure, assume_tls=tls)
        with running(app) as server:
            assert (b"AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2" in connect(server.port).say("EHLO x")) is offered


def test_without_tls_it_is_not_accepted(make: Make, connect: Connect) -> None:
    app, seen = make(allow_insecure_auth=False)
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("AUTH PLAIN " + b64("\0joe\0secret")).startswith(b"538 5.7.11 ")
    assert seen == []


def test_require_tls_comes_first(make: Make, connect: Connect) -> None:
    app, _ = make(require_tls=True)
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("AUTH PLAIN") == b"530 5.7.0 Must issue a STARTTLS command first\r\n"


def test_the_session_knows_its_user_and_may_send(make: Make, connect: Connect) -> None:
    app, _ = make()
    sessions: list[tuple[object, str]] = []
    app.on_rcpt_to(lambda ctx, next: sessions.append((ctx.session.user, ctx.session.transmission_type)))
    with running(app) as server:
        client = connect(server.port)
        assert client.say("AUTH PLAIN").startswith(b"503")
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>").startswith(b"530 5.7.0 Authentication required")
        client.say("AUTH PLAIN " + b64("\0joe\0secret"))
        assert client.say("AUTH PLAIN " + b64("\0joe\0secret")) == b"503 5.5.1 Error: already authenticated\r\n"
        assert client.say("MAIL FROM:<>").startswith(b"250")
        assert client.say("AUTH PLAIN").startswith(b"503 5.5.1 Error: MAIL transaction in progress")
        assert client.say("RCPT TO:<a@b.example>").startswith(b"250")
    assert sessions == [({"name": "joe"}, "ESMTPA")]


def test_guessing_passwords_ends_with_421(make: Make, connect: Connect) -> None:
    app, seen = make(max_errors=3)
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        heard = [client.say("AUTH PLAIN " + b64(f"\0joe\0{number}"))[:3] for number in range(4)]
        assert heard == [b"535", b"535", b"535", b"421"]
        assert client.reply() == b""
    assert len(seen) == 4


def test_long_responses_are_taken_and_too_long_ones_end_the_exchange(make: Make, connect: Connect) -> None:
    app, _ = make()
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("AUTH PLAIN " + b64("\0joe\0" + "x" * 8000)) == FAILED
        client.say("AUTH PLAIN")
        assert client.say("A" * 12288) == b"500 5.5.2 Error: line too long\r\n"
        assert client.say("AUTH PLAIN " + b64("\0joe\0secret")) == OK


def test_an_auth_handler_that_fails_is_451_and_authenticates_no_client(connect: Connect) -> None:
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2)

    @app.on_auth
    async def auth(ctx: AuthContext, next: Next) -> None:
        ctx.accept("joe")
        raise KeyError

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("AUTH PLAIN " + b64("\0joe\0secret")).startswith(b"451 4.3.0")
        assert client.say("MAIL FROM:<>").startswith(b"530")


def test_credentials_do_not_show_their_secrets(make: Make, connect: Connect) -> None:
    app, seen = make()
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.say("AUTH PLAIN " + b64("\0joe\0secret"))
        client.say("AUTH XOAUTH2 " + b64(BEARER % "token"))
    assert "secret" not in repr(seen)
    assert "token'" not in repr(seen)


def test_accepting_none_as_the_user_is_an_error(connect: Connect) -> None:
    app = Fumi(auth_optional=True, allow_insecure_auth=True, close_timeout=0.2)
    app.on_auth(lambda ctx, next: ctx.accept(None))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("AUTH PLAIN AGEAYg==").startswith(b"451 4.3.0")
