"""Python's smtplib, the client of countless scripts, to the core."""

from __future__ import annotations

import email
import email.policy
import random
import smtplib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.message import EmailMessage

import pytest

from fumi_core.testing import RunningServer
from tests.interop.starting import StartCore
from tests.support.programs import Programs

TEXT = "Subject: hi\r\n\r\nhi\r\n"


Connect = Callable[[RunningServer], smtplib.SMTP]


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as clients:
        yield lambda server: clients.enter_context(smtplib.SMTP("127.0.0.1", server.port, "client.example", timeout=240))


def test_it_reads_the_extensions(core: StartCore, connect: Connect) -> None:
    smtp = connect(core(size=1_000_000))
    assert smtp.ehlo()[0] == 250
    assert smtp.esmtp_features == {
        "pipelining": "",
        "size": "1000000",
        "8bitmime": "",
        "enhancedstatuscodes": "",
        "dsn": "",
        "smtputf8": "",
        "chunking": "",
        "binarymime": "",
        "limits": "RCPTMAX=100",
        "auth": " PLAIN LOGIN CRAM-MD5 XOAUTH2",
    }


@pytest.mark.parametrize("password", ["secret", "wrong"])
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("method", ["PLAIN", "LOGIN", "CRAM-MD5"])
def test_it_authenticates(core: StartCore, connect: Connect, method: str, initial: bool, password: str) -> None:
    server = core(auth_optional=False)
    smtp = connect(server)
    smtp.ehlo()
    smtp.user, smtp.password = "joe", password
    step = getattr(smtp, f"auth_{method.lower().replace('-', '_')}")
    if password == "wrong":
        with pytest.raises(smtplib.SMTPAuthenticationError) as refusal:
            smtp.auth(method, step, initial_response_ok=initial)
        assert refusal.value.args == (535, b"5.7.8 Error: authentication failed")
        assert smtp.mail("a@b.example") == (530, b"5.7.0 Authentication required")
    else:
        assert smtp.auth(method, step, initial_response_ok=initial) == (235, b"2.7.0 Authentication successful")
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
        assert server.messages[0].session.user == "joe"


def test_login_tries_the_methods_in_turn(core: StartCore, connect: Connect) -> None:
    server = core(auth_optional=False)
    smtp = connect(server)
    with pytest.raises(smtplib.SMTPAuthenticationError):
        smtp.login("joe", "wrong")
    tried = {method for (method, result), count in server.app.tally.authentications.items() if (result, count) == ("failed", 1)}
    assert tried == {"PLAIN", "LOGIN", "CRAM-MD5"}
    assert smtp.login("joe", "secret") == (235, b"2.7.0 Authentication successful")


def test_it_authenticates_with_xoauth2_by_its_auth_method(core: StartCore, connect: Connect) -> None:
    smtp = connect(core(auth_optional=False))
    smtp.ehlo()

    def bearer(token: str) -> Callable[..., str]:
        # A refusal is told in a challenge first, which is answered by nothing.
        return lambda challenge=None: "" if challenge else f"user=joe\x01auth=Bearer {token}\x01\x01"

    with pytest.raises(smtplib.SMTPAuthenticationError) as refusal:
        smtp.auth("XOAUTH2", bearer("stale"))
    assert refusal.value.smtp_code == 535
    assert smtp.auth("XOAUTH2", bearer("token"))[0] == 235


def test_without_auth_on_offer_it_says_so(core: StartCore, connect: Connect) -> None:
    with pytest.raises(smtplib.SMTPNotSupportedError, match="AUTH"):
        connect(core(allow_insecure_auth=False)).login("joe", "secret")


def test_send_message_uses_smtputf8_where_an_address_needs_it(core: StartCore, connect: Connect) -> None:
    server = core()
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "jörg@b.example", "δοκιμή@παράδειγμα.example", "Grüße"
    message.set_content("Grüße\n.\n")
    smtp = connect(server)
    assert smtp.send_message(message) == {}
    (got,) = server.messages
    assert (got.envelope.smtputf8, got.envelope.body) == (True, "8BITMIME")
    assert got.envelope.mail_from
    assert got.envelope.mail_from.address == "jörg@b.example"
    assert got.envelope.rcpt_to[0].address == "δοκιμή@παράδειγμα.example"
    parsed = email.message_from_bytes(got.body, policy=email.policy.default)
    assert (parsed["To"], parsed["Subject"], parsed.get_content()) == (message["To"], "Grüße", "Grüße\r\n.\r\n")


def test_it_does_not_send_such_a_message_where_that_is_hidden(core: StartCore, connect: Connect) -> None:
    message = EmailMessage()
    message["From"], message["To"] = "jörg@b.example", "c@d.example"
    with pytest.raises(smtplib.SMTPNotSupportedError):
        connect(core(hide_smtputf8=True)).send_message(message)


def test_options_of_mail_and_rcpt_arrive(core: StartCore, connect: Connect) -> None:
    server = core()
    options = ["BODY=8BITMIME", "RET=HDRS", "ENVID=a+2Bb"]
    connect(server).sendmail("a@b.example", ["c@d.example"], TEXT, options, ["NOTIFY=NEVER"])
    envelope = server.messages[0].envelope
    assert (envelope.body, envelope.dsn.ret, envelope.dsn.envid) == ("8BITMIME", "HDRS", "a+b")
    assert envelope.rcpt_to[0].args == {"NOTIFY": "NEVER"}


def test_rejections_of_recipients_are_distinguished(core: StartCore, connect: Connect) -> None:
    server = core()
    refused = connect(server).sendmail("a@b.example", ["nobody@d.example", "c@d.example"], TEXT)
    assert refused == {"nobody@d.example": (550, b"5.1.1 No such user")}
    assert [each.address for each in server.messages[0].envelope.rcpt_to] == ["c@d.example"]


def test_after_a_refused_message_the_connection_serves_on(core: StartCore, connect: Connect) -> None:
    server = core()
    smtp = connect(server)
    for _ in range(3):
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            smtp.sendmail("a@b.example", ["nobody@d.example"], TEXT)
        assert smtp.sendmail("a@b.example", ["c@d.example"], TEXT) == {}
    assert len(server.messages) == 3


def test_rset_forgets_the_transaction_and_quit_ends_the_session(core: StartCore, connect: Connect) -> None:
    smtp = connect(core())
    smtp.ehlo()
    assert smtp.mail("a@b.example")[0] == 250
    assert smtp.rset() == (250, b"2.0.0 Ok")
    assert smtp.rcpt("c@d.example") == (503, b"5.5.1 Error: need MAIL command")
    assert smtp.mail("a@b.example")[0] == 250
    assert smtp.noop()[0] == 250
    assert smtp.rcpt("c@d.example")[0] == 250
    assert smtp.ehlo()[0] == 250
    assert smtp.docmd("DATA") == (503, b"5.5.1 Error: need MAIL command")
    assert smtp.quit() == (221, b"2.0.0 Bye")
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.noop()


def test_questions_are_answered(core: StartCore, connect: Connect) -> None:
    smtp = connect(core())
    assert smtp.verify("joe")[0] == 252
    assert smtp.expn("friends")[0] == 252
    assert b"RFC 5321" in smtp.help()


def test_a_large_message_arrives_byte_for_byte(core: StartCore, connect: Connect) -> None:
    server = core()
    lines = b64encode(random.Random(3).randbytes(20_000_000)).decode()
    text = "\r\n".join(["Subject: large", "", *(lines[at : at + 76] for at in range(0, len(lines), 76)), ".", ""])
    connect(server).sendmail("a@b.example", ["c@d.example"], text)
    assert server.messages[0].body == text.encode()


def test_a_message_over_the_size_is_refused_before_it_is_sent(core: StartCore, connect: Connect) -> None:
    server = core(size=1000)
    smtp = connect(server)
    with pytest.raises(smtplib.SMTPSenderRefused) as refusal:
        smtp.sendmail("a@b.example", ["c@d.example"], "x" * 2000)
    assert refusal.value.args[:2] == (552, b"5.3.4 Message size exceeds fixed limit")
    assert smtp.sendmail("a@b.example", ["c@d.example"], TEXT) == {}


@pytest.mark.parametrize("over", ["a Unix socket", "TCP"])
def test_lmtp_takes_mail_and_refuses_an_unknown_recipient(core: StartCore, programs: Programs, over: str) -> None:
    server = core(lmtp=True)
    path = str(programs.directory / "core.sock")
    server.run(lambda: server.app.listen(path=path))
    with smtplib.LMTP("127.0.0.1", server.port) if over == "TCP" else smtplib.LMTP(path) as lmtp:
        lmtp.ehlo()
        assert lmtp.sendmail("a@b.example", ["nobody@d.example", "c@d.example"], TEXT) == {
            "nobody@d.example": (550, b"5.1.1 No such user")
        }
        assert lmtp.sendmail("a@b.example", ["c@d.example"], TEXT) == {}
    # One recipient each: of the replies that several get, smtplib would read the first alone.
    assert [message.session.transmission_type for message in server.messages] == ["LMTP", "LMTP"]
