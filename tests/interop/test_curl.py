"""curl: uploads, mechanisms and questions, to the core itself (over TLS: test_clients.py)."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from fumi_core.smtp.results import AuthResult
from fumi_core.testing import RunningServer
from tests.interop.starting import StartCore
from tests.support.programs import Programs

Curl = Callable[..., str]
MAIL = b"Subject: hi\r\n\r\nhi\r\n.\r\n..\r\n\r\nbye\r\n"
DENIED = 67
SEND_FAILED = 55


@pytest.fixture
def curl(programs: Programs) -> Curl:
    """What the server, and curl, had to say."""

    def run(server: RunningServer, *flags: str, given: bytes = MAIL, status: int = 0) -> str:
        url = f"smtp://127.0.0.1:{server.port}/client.example"
        said: str = programs.run("curl", "-sv", "--no-progress-meter", url, *flags, given=given, status=status)
        return said

    return run


def mail(*recipients: str, file: str = "-") -> list[str]:
    to = [word for each in recipients or ("c@d.example",) for word in ("--mail-rcpt", each)]
    return ["--mail-from", "a@b.example", *to, "--upload-file", file]


def by(method: str, *secret: str) -> list[str]:
    return ["--login-options", f"AUTH={method}", *secret]


def passwords(word: str) -> list[list[str]]:
    return [by(method, "--user", f"joe:{word}") for method in ("PLAIN", "LOGIN", "CRAM-MD5")]


def bearer(token: str) -> list[str]:
    return by("XOAUTH2", "--user", "joe:", "--oauth2-bearer", token)


def test_one_upload_for_several_recipients_arrives_as_it_is(core: StartCore, curl: Curl) -> None:
    server = core()
    curl(server, *mail("c@d.example", "e@f.example", "g@h.example"))
    (message,) = server.messages
    assert message.body == MAIL
    assert message.session.client_hostname == "client.example"
    assert [each.address for each in message.envelope.rcpt_to] == ["c@d.example", "e@f.example", "g@h.example"]


@pytest.mark.parametrize("text", [b"", b".", b".\r\n", b"\r\n.\r\n", b"x\r\n..", b"x" * 5_000_000, b".\r\n" * 300_000])
def test_any_text_arrives_as_it_is(core: StartCore, curl: Curl, text: bytes) -> None:
    server = core()
    curl(server, *mail(), given=text)
    assert server.messages[0].body == text + b"\r\n" * (not text.endswith(b"\r\n") and text != b"")


@pytest.mark.parametrize("initial", [["--sasl-ir"], []])
@pytest.mark.parametrize("method", [*passwords("secret"), bearer("token")])
def test_it_authenticates_and_sends_mail_auth(core: StartCore, curl: Curl, method: list[str], initial: list[str]) -> None:
    server = core(auth_optional=False)
    curl(server, *method, *initial, *mail(), "--mail-auth", "first@b.example")
    (message,) = server.messages
    assert message.session.user == "joe"
    assert message.envelope.mail_from
    assert message.envelope.mail_from.args["AUTH"] == "<first@b.example>"


@pytest.mark.parametrize("method", passwords("wrong"))
def test_a_wrong_password_is_denied(core: StartCore, curl: Curl, method: list[str]) -> None:
    server = core(auth_optional=False)
    assert "< 535 5.7.8 Error: authentication failed" in curl(server, *method, *mail(), status=DENIED)
    assert server.messages == []


def test_a_stale_token_is_denied(core: StartCore, curl: Curl) -> None:
    server = core(auth_optional=False)
    # The challenge that says why is enough for curl: it hangs up.
    assert "< 334 " in curl(server, *bearer("stale"), *mail(), status=DENIED)
    assert server.app.tally.authentications["XOAUTH2", AuthResult.FAILED] == 1
    assert server.messages == []


def test_left_to_itself_it_chooses_a_mechanism_that_shows_no_password(core: StartCore, curl: Curl) -> None:
    said = curl(core(auth_optional=False), "--user", "joe:secret", *mail())
    assert "> AUTH CRAM-MD5" in said


def test_a_refused_recipient_is_the_end_of_it_unless_it_may_fail(core: StartCore, curl: Curl) -> None:
    server = core()
    curl(server, *mail("nobody@d.example", "c@d.example"), status=SEND_FAILED)
    assert server.messages == []
    curl(server, *mail("nobody@d.example", "c@d.example"), "--mail-rcpt-allowfails")
    assert len(server.messages) == 1


def test_two_messages_arrive_on_one_connection(core: StartCore, curl: Curl) -> None:
    server = core(max_clients=1)
    again = ["--next", "-sv", f"smtp://127.0.0.1:{server.port}/client.example", *mail("e@f.example")]
    said = curl(server, *mail(), *again)
    assert re.search("Re-?using existing", said)
    assert [message.envelope.rcpt_to[0].address for message in server.messages] == ["c@d.example", "e@f.example"]
    assert server.messages[0].session is server.messages[1].session


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--mail-rcpt", "joe@d.example"], "252 2.5.0 Cannot VRFY user, but will accept message and attempt delivery"),
        (["--mail-rcpt", "friends", "--request", "EXPN"], "252 2.5.0 Cannot EXPN list"),
        (["--request", "VRFY joe"], "252 2.5.0 Cannot VRFY user, but will accept message and attempt delivery"),
        (["--request", "NOOP"], "250 2.0.0 Ok"),
        ([], "214 2.0.0 See RFC 5321 for the commands: "),
    ],
)
def test_questions_are_answered(core: StartCore, curl: Curl, flags: list[str], answer: str) -> None:
    assert f"< {answer}" in curl(core(), *flags)


def test_a_declared_size_over_the_limit_is_refused(core: StartCore, curl: Curl, programs: Programs) -> None:
    (programs.directory / "mail").write_bytes(b"x" * 2000)
    said = curl(core(size=1000), *mail(file="mail"), status=SEND_FAILED)
    assert "< 552 5.3.4 Message size exceeds fixed limit" in said


def test_a_unix_socket_takes_mail(core: StartCore, curl: Curl, programs: Programs) -> None:
    server = core()
    path = str(programs.directory / "core.sock")
    server.run(lambda: server.app.listen(path=path))
    curl(server, "--unix-socket", path, *mail())
    assert server.messages[0].session.remote_address.startswith("unix")
