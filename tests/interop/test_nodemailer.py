"""Nodemailer, the mail client of Node's world, sends to the core and through the edge."""

from __future__ import annotations

import email
import email.policy
import json
import random
from base64 import b64encode
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from fumi_core.smtp.results import AuthResult
from tests.interop.starting import StartCore, StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.programs import Programs

CLIENT = Path(__file__).with_name("nodemailer_client.js")
MAIL = {"from": "a@b.example", "to": "c@d.example", "subject": "hi", "text": "hello\n.dot\n..dots\n"}
SAID_535 = "535 5.7.8 Error: authentication failed"
Send = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def send(programs: Programs) -> Send:
    """Sends mails with one transport; what nodemailer says of each."""

    def function(port: int, *mails: dict[str, Any], token: str | None = None, **transport: Any) -> list[dict[str, Any]]:
        options = {"host": "127.0.0.1", "port": port, "name": "client.example", "ignoreTLS": True, **transport}
        job = json.dumps({"transport": options, "token": token, "mails": mails}).encode()
        # Debian's node looks there by itself; others do not.
        said = programs.run("node", CLIENT, given=job, environment={"NODE_PATH": "/usr/share/nodejs"})
        results: list[dict[str, Any]] = json.loads(said)
        return results

    return function


def auth(method: str, password: str = "secret") -> dict[str, Any]:
    return {"auth": {"user": "joe", "pass": password}, "authMethod": method}


def oauth(token: str) -> dict[str, Any]:
    return {"auth": {"type": "OAuth2", "user": "joe", "accessToken": token}}


def test_a_message_arrives_with_its_envelope(core: StartCore, send: Send) -> None:
    server = core()
    (result,) = send(server.port, MAIL)
    assert result == {"accepted": ["c@d.example"], "rejected": [], "response": "250 2.0.0 Ok"}
    (message,) = server.messages
    assert message.envelope.mail_from
    assert message.envelope.mail_from.address == "a@b.example"
    assert message.session.client_hostname == "client.example"
    assert message.session.transmission_type == "ESMTP"
    assert message.body.endswith(b"\r\n\r\nhello\r\n.dot\r\n..dots\r\n")


@pytest.mark.parametrize("transport", [auth("PLAIN"), auth("LOGIN"), auth("CRAM-MD5"), oauth("token")])
def test_it_authenticates(core: StartCore, send: Send, transport: dict[str, Any]) -> None:
    server = core(auth_optional=False)
    assert send(server.port, MAIL, **transport)[0]["accepted"] == ["c@d.example"]
    assert server.messages[0].session.user == "joe"
    assert server.messages[0].session.transmission_type == "ESMTPA"


@pytest.mark.parametrize("transport", [auth("PLAIN", "x"), auth("LOGIN", "x"), auth("CRAM-MD5", "x"), oauth("stale")])
def test_wrong_credentials_are_an_eauth_with_the_servers_text(core: StartCore, send: Send, transport: dict[str, Any]) -> None:
    server = core(auth_optional=False)
    method = transport.get("authMethod", "XOAUTH2")
    (result,) = send(server.port, MAIL, token="stale too", **transport)
    assert result == {"code": "EAUTH", "command": f"AUTH {method}", "responseCode": 535, "response": SAID_535}
    assert server.messages == []


def test_a_stale_token_is_renewed_on_the_same_connection(core: StartCore, send: Send) -> None:
    server = core(auth_optional=False, max_clients=1)
    assert send(server.port, MAIL, token="token", **oauth("stale"))[0]["accepted"] == ["c@d.example"]
    assert server.messages[0].session.user == "joe"
    assert server.app.tally.authentications["XOAUTH2", AuthResult.FAILED] == 1


def test_an_auth_that_was_not_offered_is_refused(core: StartCore, send: Send) -> None:
    server = core(allow_insecure_auth=False)
    (result,) = send(server.port, MAIL, forceAuth=True, **auth("PLAIN"))
    assert (result["code"], result["responseCode"]) == ("EAUTH", 538)


def test_attachments_arrive_byte_for_byte(core: StartCore, send: Send) -> None:
    server = core()
    data = random.Random(1).randbytes(1_000_001)
    page = "<p>Grüße</p>" + "x" * 2000
    attachments = [
        {"filename": "random.bin", "content": b64encode(data).decode(), "encoding": "base64"},
        {"filename": "größe.txt", "content": ".\r\n..\r\nbye\r\n", "contentType": "text/plain"},
    ]
    (result,) = send(server.port, {**MAIL, "subject": "Grüße", "html": page, "attachments": attachments})
    assert result["accepted"]
    message = email.message_from_bytes(server.messages[0].body, policy=email.policy.default)
    assert message["Subject"] == "Grüße"
    html = message.get_body(("html",))
    assert html is not None
    assert html.get_content().rstrip("\n") == page
    binary, text = message.iter_attachments()
    assert (binary.get_filename(), binary.get_payload(decode=True)) == ("random.bin", data)
    assert (text.get_filename(), text.get_payload(decode=True)) == ("größe.txt", b".\r\n..\r\nbye\r\n")


@pytest.mark.parametrize("text", ["a: b\r\n\r\n", "a: b\r\n\r\n.\r\n", "a: b\r\n\r\n..\r\n.x\r\n\r\n\r\n", "a: b\r\n\r\n.no end"])
def test_a_raw_message_arrives_as_it_was_written(core: StartCore, send: Send, text: str) -> None:
    server = core()
    send(server.port, {"envelope": {"from": "", "to": ["c@d.example"]}, "raw": text})
    assert server.messages[0].body.decode() == text + "\r\n" * (not text.endswith("\r\n"))
    mail_from = server.messages[0].envelope.mail_from
    assert mail_from
    assert mail_from.address == ""


def test_dsn_parameters_arrive(core: StartCore, send: Send) -> None:
    server = core()
    wants = {"id": "a+b=c d", "return": "headers", "notify": ["success", "delay"], "recipient": "first@d.example"}
    assert send(server.port, {**MAIL, "dsn": wants})[0]["accepted"]
    envelope = server.messages[0].envelope
    assert (envelope.dsn.envid, envelope.dsn.ret) == ("a+b=c d", "HDRS")
    assert envelope.rcpt_to[0].args == {"NOTIFY": "SUCCESS,DELAY", "ORCPT": "rfc822;first@d.example"}


def test_utf8_addresses_arrive_as_they_are(core: StartCore, send: Send) -> None:
    server = core()
    (result,) = send(server.port, {**MAIL, "from": "jörg@b.example", "to": "δοκιμή@d.example"})
    assert result["accepted"] == ["δοκιμή@d.example"]
    (message,) = server.messages
    assert message.envelope.smtputf8
    assert message.envelope.mail_from
    assert message.envelope.mail_from.address == "jörg@b.example"
    assert message.envelope.rcpt_to[0].address == "δοκιμή@d.example"


def test_a_server_that_hides_smtputf8_refuses_them(core: StartCore, send: Send) -> None:
    server = core(hide_smtputf8=True)
    (result,) = send(server.port, {**MAIL, "to": "δοκιμή@d.example"})
    assert (result["code"], result["responseCode"]) == ("EENVELOPE", 553)


def test_one_refused_recipient_does_not_keep_the_others_from_the_mail(core: StartCore, send: Send) -> None:
    server = core()
    (result,) = send(server.port, {**MAIL, "to": ["c@d.example", "nobody@d.example", "e@f.example"]})
    assert result["accepted"] == ["c@d.example", "e@f.example"]
    assert result["rejected"] == ["nobody@d.example"]
    assert [each.address for each in server.messages[0].envelope.rcpt_to] == ["c@d.example", "e@f.example"]


def test_with_every_recipient_refused_nothing_is_sent(core: StartCore, send: Send) -> None:
    server = core()
    (result,) = send(server.port, {**MAIL, "to": ["nobody@d.example", "nobody@f.example"]})
    assert (result["code"], result["response"]) == ("EENVELOPE", "550 5.1.1 No such user")
    assert server.messages == []


def decoded(message: Message) -> bytes:
    """The content of a message in one part."""
    content = message.get_payload(decode=True)
    assert isinstance(content, bytes)
    return content


def test_a_pool_sends_many_messages_on_few_connections(core: StartCore, send: Send) -> None:
    server = core()
    mails = [{**MAIL, "subject": str(number), "text": "x" * number} for number in range(300)]
    results = send(server.port, *mails, pool=True, maxConnections=4, maxMessages=1000, **auth("PLAIN"))
    assert [result["response"] for result in results] == ["250 2.0.0 Ok"] * 300
    parsed = [email.message_from_bytes(message.body) for message in server.messages]
    bodies = {message["Subject"]: decoded(message).strip() for message in parsed}
    assert bodies == {str(number): b"x" * number for number in range(300)}
    assert len({message.session.id for message in server.messages}) <= 4


def test_it_does_not_send_what_the_server_says_is_too_large(core: StartCore, send: Send) -> None:
    server = core(size=10_000)
    envelope = {"from": "a@b.example", "to": ["c@d.example"], "size": 10_001}
    (result,) = send(server.port, {**MAIL, "envelope": envelope, "text": "x" * 9000})
    assert result["code"] == "EMESSAGE"
    # It read our SIZE, and never asked.
    assert "responseCode" not in result


def test_a_message_that_is_too_large_is_552_and_the_next_one_is_fine(core: StartCore, send: Send) -> None:
    server = core(size=10_000)
    results = send(server.port, {**MAIL, "text": "x" * 2_000_000}, MAIL, pool=True, maxConnections=1)
    assert (results[0]["code"], results[0]["responseCode"]) == ("EMESSAGE", 552)
    assert results[1]["response"] == "250 2.0.0 Ok"
    assert len(server.messages) == 1


def test_lmtp_answers_each_recipient(core: StartCore, send: Send) -> None:
    server = core(lmtp=True)
    (result,) = send(server.port, {**MAIL, "to": ["c@d.example", "full@d.example", "nobody@d.example"]}, lmtp=True)
    assert result["accepted"] == ["c@d.example"]
    assert sorted(result["rejected"]) == ["full@d.example", "nobody@d.example"]
    assert server.messages[0].session.transmission_type == "LMTP"


@pytest.mark.parametrize("implicit", [True, False])
def test_through_the_edge_it_may_authenticate(
    core: StartCore, edge: StartEdge, send: Send, certificate: CertificateFiles, implicit: bool
) -> None:
    server = core(proxy_protocol="required", allow_insecure_auth=False, auth_optional=False, require_tls=True)
    front = edge(server.port)
    flags = {"secure": True} if implicit else {"ignoreTLS": False, "requireTLS": True}
    tls = {"ca": certificate[0].read_text(), "servername": "localhost"}
    port = front.tls_port if implicit else front.starttls_port
    (result,) = send(port, MAIL, tls=tls, localAddress="127.0.0.9", **flags, **auth("PLAIN"))
    assert result["accepted"] == ["c@d.example"]
    session = server.messages[0].session
    assert (session.remote_address, session.user, session.transmission_type) == ("127.0.0.9", "joe", "ESMTPSA")
    assert session.tls
    assert (session.tls.version, session.tls.sni) == ("TLSv1.3", "localhost")


def test_a_client_that_requires_tls_does_not_send_without(core: StartCore, send: Send) -> None:
    server = core()
    (result,) = send(server.port, MAIL, ignoreTLS=False, requireTLS=True)
    assert result["code"] == "ETLS"
    assert server.messages == []
