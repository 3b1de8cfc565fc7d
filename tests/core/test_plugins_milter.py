"""A mail filter gets each step of a session, and its answers decide."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from fumi_core import Fumi, plugins
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins.milter import conversation
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.testing import RunningServer, running
from tests.core.client import Client, Connect
from tests.core.scripted_milter import (
    ACCEPT,
    CONNECTION_FAILURE,
    CONTINUE,
    DISCARD,
    PROGRESS,
    REJECT,
    SHUTDOWN,
    SKIP,
    TEMPFAIL,
    ScriptedMilter,
    StartMilter,
    negotiated,
    one_by_one,
    packet,
    strings,
)
from tests.support.ports import kept_port
from tests.support.waiting import until

MESSAGE = b"Subject: hi\r\nX-Two:\tlines\r\n of it\r\n\r\nbody\r\n..\r\n"
RECEIVED = MESSAGE.replace(b"\r\n..", b"\r\n.")
UNAVAILABLE = b"451 4.7.1 Service unavailable - try again later\r\n"
REJECTED = b"550 5.7.1 Command rejected\r\n"


class Delivered:
    """What the handler after the filters got."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.senders: list[str] = []
        self.recipients: list[list[str]] = []

    async def data(self, ctx: DataContext, next: Next) -> None:
        text = b"".join([piece async for piece in ctx.stream])
        envelope = ctx.session.envelope
        self.texts.append(text)
        self.senders.append(envelope.mail_from.address if envelope.mail_from else "")
        self.recipients.append([each.address for each in envelope.rcpt_to])


def build(*milters: ScriptedMilter | str, delivered: Delivered | None = None, options: dict[str, Any] = {}, **given: Any) -> Fumi:  # noqa: B006
    app = Fumi(**{"auth_optional": True, "allow_insecure_auth": True, "close_timeout": 0.2, **options})
    app.on_auth(lambda ctx, next: ctx.accept(ctx.credentials.username))
    for each in milters:
        app.use(plugins.milter(each if isinstance(each, str) else each.address, **given))
    app.on_data((delivered or Delivered()).data)
    return app


def message(client: Client, text: bytes = MESSAGE) -> bytes:
    assert client.say("DATA").startswith(b"354")
    return client.say(text + b".")


def deliver(server: RunningServer, connect: Connect, text: bytes = MESSAGE, *recipients: str) -> bytes:
    client = connect(server.port)
    client.envelope("a@b.example", *recipients)
    return message(client, text)


# What the filter gets


def test_the_filter_gets_each_step(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    with running(build(milter)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.say("MAIL FROM:<a@b.example> BODY=8BITMIME")
        client.say("RCPT TO:<c@d.example>")
        client.say("RCPT TO:<e@f.example>")
        assert message(client) == b"250 2.0.0 Ok\r\n"
        port = client.sock.getsockname()[1]
        client.close()
        until(lambda: "quit" in milter.names())
        assert milter.steps == [
            ("negotiate", bytes.fromhex("00000006 000001ff 001df7ff")),
            ("connect", b"unknown\x004" + port.to_bytes(2, "big") + b"127.0.0.1\0"),
            ("helo", b"client.example\0"),
            ("mail", b"<a@b.example>\0BODY=8BITMIME\0"),
            ("rcpt", b"<c@d.example>\0"),
            ("rcpt", b"<e@f.example>\0"),
            ("data", b""),
            ("header", b"Subject\0hi\0"),
            ("header", b"X-Two\0\tlines\n of it\0"),
            ("eoh", b""),
            ("body", b"body\r\n.\r\n"),
            ("end", b""),
            ("quit", b""),
        ]


def test_the_macros_are_those_of_postfix(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    with running(build(milter, options={"name": "mx.example"})) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.say("AUTH PLAIN " + base64.b64encode(b"\0joe\0secret").decode())
        client.say("MAIL FROM:<a@b.example>")
        client.say("RCPT TO:<c@d.example>")
        message(client)
        id = server.messages[0].session.id.encode()
    assert milter.macros["connect"].keys() == {b"j", b"{daemon_name}", b"{daemon_addr}", b"v", b"_"}
    assert milter.macros["connect"][b"j"] == b"mx.example"
    assert milter.macros["connect"][b"_"] == b"unknown [127.0.0.1]"
    assert milter.macros["mail"] == {
        b"i": id, b"{auth_type}": b"PLAIN", b"{auth_authen}": b"joe",
        b"{mail_addr}": b"a@b.example", b"{mail_host}": b"b.example", b"{mail_mailer}": b"smtp",
    }  # fmt: skip
    assert milter.macros["rcpt"] == {
        b"i": id, b"{rcpt_addr}": b"c@d.example", b"{rcpt_host}": b"d.example", b"{rcpt_mailer}": b"local",
    }  # fmt: skip
    assert milter.macros["data"] == milter.macros["eoh"] == milter.macros["end"] == {b"i": id}


def test_the_filter_gets_the_clients_tls_macros(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    app = build(milter)
    handlers = app._handlers["connect"]

    def encrypted(ctx: Any, next: Next) -> Next:
        from fumi_core.proxy_protocol import TLSInfo

        ctx.session.tls = TLSInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", None, None, True, True, "client.example")
        return next()

    app.on_connect(encrypted)
    handlers.insert(0, handlers.pop())
    with running(app) as server:
        connect(server.port).envelope()
    assert milter.macros["helo"] == {
        b"{tls_version}": b"TLSv1.3", b"{cipher}": b"TLS_AES_256_GCM_SHA384", b"{cipher_bits}": b"256",
        b"{cert_subject}": b"client.example",
    }  # fmt: skip


def test_a_filter_may_choose_its_macros(scripted_milter: StartMilter, connect: Connect) -> None:
    lists = b"\0\0\0\0{client_addr} j\0\0\0\0\2mail_addr\0"
    milter = scripted_milter(negotiate=negotiated(lists=lists))
    with running(build(milter, options={"name": "mx.example"})) as server:
        connect(server.port).envelope()
    assert milter.macros["connect"] == {b"{client_addr}": b"127.0.0.1", b"j": b"mx.example"}
    assert milter.macros["mail"] == {b"mail_addr": b"a@b.example"}


def test_a_large_body_arrives_in_chunks_and_whole(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    delivered = Delivered()
    body = b"".join(b"%d line\r\n" % number for number in range(100_000))
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, b"A: b\r\n\r\n" + body).startswith(b"250")
    chunks = milter.data("body")
    assert b"".join(chunks) == body
    assert {len(each) for each in chunks[:-1]} == {65_535}
    assert delivered.texts == [b"A: b\r\n\r\n" + body]


@pytest.mark.parametrize(
    ("text", "headers", "body"),
    [
        (b"", [], b""),
        (b"A: b\r\n", [b"A\0b\0"], b""),
        (b"A: b\r\n\r\n", [b"A\0b\0"], b""),
        (b"\r\nbody\r\n", [], b"body\r\n"),
        (b"no header\r\n", [], b"no header\r\n"),
        (b"A: b\r\nno header\r\n\r\nbody\r\n", [b"A\0b\0"], b"no header\r\n\r\nbody\r\n"),
        (b" folded: x\r\n", [], b" folded: x\r\n"),
        (b"A : b\r\nB:\r\nC:  two\r\n\r\n\r\n", [b"A\0b\0", b"B\0\0", b"C\0 two\0"], b"\r\n"),
        (b"A: n\0l\r\n\r\n", [b"A\0n l\0"], b""),
    ],
)
def test_where_the_header_ends(
    text: bytes, headers: list[bytes], body: bytes, scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter()
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, text).startswith(b"250")
    assert (milter.data("header"), b"".join(milter.data("body"))) == (headers, body)
    assert delivered.texts == [text]


def test_a_header_that_no_filter_could_get_is_rejected(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        line = b"x" * 900
        for text in (
            b"A: b\r\n" * 50_000 + b"\r\n",
            b"A:\r\n" * 10_001 + b"\r\n",
            b"A: " + b"\r\n ".join([line] * 80) + b"\r\n\r\n",
        ):
            assert deliver(server, connect, text) == b"552 5.3.4 Error: message header too big\r\n"
    assert not delivered.texts


# Negotiation


@pytest.mark.parametrize("version", [2, 3, 4, 5, 6])
def test_every_version_is_spoken(version: int, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(negotiate=negotiated(version, 0x3F, 0))
    with running(build(milter)) as server:
        assert deliver(server, connect).startswith(b"250")
    assert ("data" in milter.names()) == (version >= 4)
    until(lambda: milter.names()[-1] == "quit")


def test_a_filter_gets_only_the_steps_that_it_wants(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(negotiate=negotiated(steps=0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x200))
    with running(build(milter)) as server:
        assert deliver(server, connect).startswith(b"250")
    assert milter.names()[:2] == ["negotiate", "end"]


def test_a_filter_need_not_answer(scripted_milter: StartMilter, connect: Connect) -> None:
    silent = dict.fromkeys(("connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body"), b"")
    milter = scripted_milter(**silent, negotiate=negotiated(steps=0x80 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0xC0000))
    with running(build(milter)) as server:
        assert deliver(server, connect).startswith(b"250")
    assert milter.names()[:12].count("header") == 2


def test_a_filter_may_want_the_space_after_the_colon(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(negotiate=negotiated(steps=0x100000), end=packet(b"h", strings(b"X", b"  y")) + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, b"A:  b\r\nB:c\r\n\r\n").startswith(b"250")
    assert milter.data("header") == [b"A\0  b\0", b"B\0c\0"]
    assert delivered.texts == [b"A:  b\r\nB:c\r\nX:  y\r\n\r\n"]


# Decisions


@pytest.mark.parametrize(
    ("stage", "answer", "reply"),
    [
        ("connect", REJECT, REJECTED),
        ("connect", TEMPFAIL, UNAVAILABLE),
        ("connect", SHUTDOWN, b"421 4.7.0 Service unavailable, closing connection\r\n"),
        ("connect", packet(b"y", b"554 5.7.1 Go away\0"), b"554 5.7.1 Go away\r\n"),
    ],
)
def test_a_rejected_client_gets_the_reply_in_place_of_the_banner(
    stage: str, answer: bytes, reply: bytes, scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(**{stage: answer})
    with running(build(milter)) as server:
        assert connect(server.port).banner == reply


REPLIES = [
    (REJECT, REJECTED),
    (TEMPFAIL, UNAVAILABLE),
    (SHUTDOWN, b"421 4.7.0 Service unavailable, closing connection\r\n"),
    (CONNECTION_FAILURE, b"421 4.7.0 Service unavailable, closing connection\r\n"),
    (packet(b"y", b"550 5.7.1 100%% spam\0"), b"550 5.7.1 100% spam\r\n"),
    (packet(b"y", b"452 Too busy\0"), b"452 4.3.1 Too busy\r\n"),
    (packet(b"y", b"554-5.7.0 one\r\n554 5.7.0 two\0"), b"554-5.7.0 one\r\n554 5.7.0 two\r\n"),
]


@pytest.mark.parametrize("stage", ["helo", "mail"])
@pytest.mark.parametrize(("answer", "reply"), REPLIES)
def test_a_rejected_sender(stage: str, answer: bytes, reply: bytes, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(**{stage: answer})
    with running(build(milter)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert client.say("MAIL FROM:<a@b.example>") == reply
        if not reply.startswith(b"421"):
            assert client.say("MAIL FROM:<a@b.example>") == reply


@pytest.mark.parametrize(("answer", "reply"), REPLIES)
def test_one_rejected_recipient_of_two(answer: bytes, reply: bytes, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(rcpt=lambda data: answer if b"c@" in data else CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.say("MAIL FROM:<a@b.example>")
        assert client.say("RCPT TO:<c@d.example>") == reply
        if not reply.startswith(b"421"):
            assert client.say("RCPT TO:<e@f.example>").startswith(b"250")
            assert message(client).startswith(b"250")
            assert delivered.recipients == [["e@f.example"]]


@pytest.mark.parametrize("stage", ["data", "header", "eoh", "body", "end"])
@pytest.mark.parametrize(("answer", "reply"), REPLIES)
def test_a_rejected_message(stage: str, answer: bytes, reply: bytes, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(**{stage: answer})
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        client = connect(server.port)
        client.envelope()
        assert message(client) == reply
        if not reply.startswith(b"421"):
            milter.answers[stage] = CONTINUE
            client.envelope()
            assert message(client).startswith(b"250")
    assert len(delivered.texts) == (not reply.startswith(b"421"))


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "header", "eoh", "body", "end"])
def test_a_discarded_message_is_accepted_and_not_delivered(stage: str, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(**{stage: DISCARD})
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        client = connect(server.port)
        client.envelope("a@b.example", "c@d.example", "e@f.example")
        assert message(client) == b"250 2.0.0 Ok\r\n"
        milter.answers[stage] = CONTINUE
        client.envelope()
        assert message(client) == b"250 2.0.0 Ok\r\n"
    assert delivered.texts == [RECEIVED]


@pytest.mark.parametrize("stage", ["connect", "helo"])
def test_a_filter_that_accepts_a_client_gets_no_more_steps_of_it(
    stage: str, scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(**{stage: ACCEPT})
    with running(build(milter)) as server:
        client = connect(server.port)
        for _ in range(2):
            client.envelope()
            assert message(client).startswith(b"250")
    assert not {"mail", "rcpt", "end"} & set(milter.names())


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "header", "eoh", "body", "end"])
def test_an_accepted_message_is_delivered_and_the_next_is_sent_to_the_filter(
    stage: str, scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(**{stage: ACCEPT})
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        client = connect(server.port)
        for _ in range(2):
            client.envelope("a@b.example", "c@d.example", "e@f.example")
            assert message(client).startswith(b"250")
    assert delivered.texts == [RECEIVED] * 2
    assert milter.names().count("mail") == 2
    assert milter.names().count(stage) == 2


def test_a_filter_may_skip_the_rest_of_a_stage(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(negotiate=negotiated(steps=0x400), header=SKIP, body=SKIP, rcpt=SKIP)
    with running(build(milter)) as server:
        client = connect(server.port)
        for _ in range(2):
            client.envelope("a@b.example", "c@d.example", "e@f.example")
            assert message(client, b"A: b\r\nC: d\r\n\r\n" + b"x\r\n" * 100_000).startswith(b"250")
    names = milter.names()
    assert [names.count(each) for each in ("rcpt", "header", "body", "end")] == [2, 2, 2, 2]


def test_progress_is_no_answer(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=PROGRESS * 3 + REJECT)
    with running(build(milter)) as server:
        assert deliver(server, connect) == REJECTED


def test_several_filters_in_order(scripted_milter: StartMilter, connect: Connect) -> None:
    first = scripted_milter(end=packet(b"h", strings(b"X-First", b"1")) + CONTINUE)
    second = scripted_milter(end=packet(b"h", strings(b"X-Second", b"2")) + ACCEPT)
    delivered = Delivered()
    with running(build(first, second, delivered=delivered)) as server:
        assert deliver(server, connect, b"A: b\r\n\r\nbody\r\n").startswith(b"250")
    assert second.data("header") == [b"A\0b\0", b"X-First\x001\0"]
    assert delivered.texts == [b"A: b\r\nX-First: 1\r\nX-Second: 2\r\n\r\nbody\r\n"]


def test_a_sender_that_one_filter_rejects_is_not_sent_to_the_next(scripted_milter: StartMilter, connect: Connect) -> None:
    first, second = scripted_milter(mail=REJECT), scripted_milter()
    with running(build(first, second)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert client.say("MAIL FROM:<a@b.example>") == REJECTED
    assert "mail" not in second.names()


def test_authenticated_clients_may_be_skipped(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(mail=REJECT)
    delivered = Delivered()
    with running(build(milter, delivered=delivered, skip_authenticated=True)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert client.say("MAIL FROM:<a@b.example>") == REJECTED
        client.say("AUTH PLAIN " + base64.b64encode(b"\0joe\0secret").decode())
        client.envelope()
        assert message(client).startswith(b"250")
    assert milter.names().count("mail") == len(delivered.texts) == 1


# The life of a connection


def test_an_unfinished_transaction_is_aborted(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    with running(build(milter)) as server:
        client = connect(server.port)
        client.envelope()
        client.say("RSET")
        client.envelope()
        until(lambda: milter.names().count("rcpt") == 2)
        assert milter.names()[-6:] == ["helo", "mail", "rcpt", "abort", "mail", "rcpt"]
        client.close()
        until(lambda: milter.names()[-2:] == ["abort", "quit"])


def test_a_connection_serves_one_client_after_the_other_if_wanted(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    with running(build(milter, reuse_connections=True)) as server:
        for _ in range(3):
            milter.steps.clear()
            client = connect(server.port)
            client.envelope()
            assert message(client).startswith(b"250")
            client.close()
            until(lambda: "quit_nc" in milter.names())
            assert milter.names()[-5:] == ["header", "eoh", "body", "end", "quit_nc"]
    assert milter.connections == 1


def test_idle_connections_end_with_the_server(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    with running(build(milter, reuse_connections=True)) as server:
        connect(server.port).close()
        until(lambda: "quit_nc" in milter.names())
    until(lambda: milter.names()[-1] == "quit")


def test_a_filter_of_an_old_version_gets_no_second_client(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(negotiate=negotiated(5))
    with running(build(milter, reuse_connections=True)) as server:
        connect(server.port).close()
        until(lambda: milter.names()[-1] == "quit")


def test_a_reused_connection_that_fails_is_replaced(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(connect=one_by_one([CONTINUE, None, CONTINUE]))
    with running(build(milter, reuse_connections=True)) as server:
        connect(server.port).close()
        until(lambda: milter.names()[-1] == "quit_nc")
        assert deliver(server, connect).startswith(b"250")
    assert milter.connections == 2


def test_a_connection_that_the_filter_has_closed_is_replaced(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    with running(build(milter)) as server:
        client = connect(server.port)
        for _ in range(3):
            client.envelope()
            assert message(client).startswith(b"250")
            milter.drop()
            connections = milter.connections
            until(lambda: client.say("NOOP").startswith(b"250"))
            client.say("RSET")
        assert connections == milter.connections == 3


def test_a_filter_on_a_unix_socket(scripted_milter: StartMilter, connect: Connect, tmp_path: Any) -> None:
    milter = scripted_milter(str(tmp_path / "milter"))
    with running(build(milter)) as server:
        assert deliver(server, connect).startswith(b"250")


# Failures


def test_a_filter_that_is_not_there_defers_mail(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    with kept_port() as sock, running(build(f"127.0.0.1:{sock.getsockname()[1]}")) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert client.say("MAIL FROM:<a@b.example>") == UNAVAILABLE
        assert client.say("MAIL FROM:<a@b.example>") == UNAVAILABLE
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] != []


def test_mail_passes_a_filter_that_is_not_there_if_wanted(connect: Connect) -> None:
    delivered = Delivered()
    with kept_port() as sock:
        app = build(f"127.0.0.1:{sock.getsockname()[1]}", delivered=delivered, failure="accept")
        with running(app) as server:
            assert deliver(server, connect).startswith(b"250")
    assert delivered.texts == [RECEIVED]


STEPS = ["negotiate", "connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "end"]
BROKEN: dict[str, bytes | None] = {
    "closed": None,
    "silent": b"",
    "unknown letter": packet(b"z"),
    "no length": b"\0\0\0\0",
    "too long": b"\xff\xff\xff\xffc",
    "two answers": CONTINUE + CONTINUE,
    "an answer and a part": CONTINUE + b"\0",
    "data after continue": packet(b"c", b"x"),
    "only progress, then closed": PROGRESS,
    "no reply": packet(b"y", b"250 Ok\0"),
    "no reply at all": packet(b"y", b"\0"),
    "reply without an end": packet(b"y", b"550 5.7.1 no"),
    "codes that differ": packet(b"y", b"550-5.7.1 a\r\n451 4.7.1 b\0"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("failure", ["tempfail", "accept"])
def test_a_filter_that_fails_at_any_step_defers_mail_or_accepts_it(
    step: str, broken: str, failure: str, scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(**{step: BROKEN[broken]})
    delivered = Delivered()
    seconds = 0.1 if BROKEN[broken] in (b"", PROGRESS) else 30.0
    timeouts: dict[str, Any] = dict.fromkeys(("connect_timeout", "command_timeout", "content_timeout"), seconds)
    with running(build(milter, delivered=delivered, failure=failure, **timeouts)) as server:
        client = connect(server.port)
        assert client.banner.startswith(b"220")
        replies = [client.say("EHLO client.example"), client.say("MAIL FROM:<a@b.example>")]
        if replies[-1].startswith(b"250"):
            replies.append(client.say("RCPT TO:<c@d.example>"))
        if replies[-1].startswith(b"250"):
            replies.append(message(client))
    assert all(reply.startswith(b"250") for reply in replies[:-1])
    assert replies[-1] == (UNAVAILABLE if failure == "tempfail" else b"250 2.0.0 Ok\r\n")
    assert delivered.texts == ([RECEIVED] if failure == "accept" else [])


@pytest.mark.parametrize("failure", ["tempfail", "accept"])
def test_after_a_failure_the_filter_gets_nothing_more_of_the_transaction(
    failure: str, scripted_milter: StartMilter, connect: Connect
) -> None:
    """The filter fails between two recipients, and then has no sender for the second."""
    milter = scripted_milter(rcpt=one_by_one([CONTINUE, None, CONTINUE]))
    delivered = Delivered()
    with running(build(milter, delivered=delivered, failure=failure)) as server:
        client = connect(server.port)
        client.envelope()
        good = b"250 2.1.5 Ok\r\n" if failure == "accept" else UNAVAILABLE
        assert client.say("RCPT TO:<e@f.example>") == good
        assert client.say("RCPT TO:<g@h.example>") == good
        assert message(client) == (b"250 2.0.0 Ok\r\n" if failure == "accept" else UNAVAILABLE)
        client.envelope()
        assert message(client) == b"250 2.0.0 Ok\r\n"
    assert delivered.recipients == [["c@d.example", "e@f.example", "g@h.example"]] * (failure == "accept") + [["c@d.example"]]


def test_a_filter_that_never_decides_is_too_slow(
    scripted_milter: StartMilter, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MAX_STEP_SECONDS", 0.2)
    milter = scripted_milter(end=PROGRESS * 1000)
    with running(build(milter)) as server:
        assert deliver(server, connect) == UNAVAILABLE
    assert milter.closed == 1


LOCAL = ProxyHeader(2, "LOCAL").to_bytes()
BEHIND_PROXY = {"proxy_protocol": "required", "use_xclient": True}


def test_a_health_check_is_no_client_of_the_filter(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(connect=REJECT)
    with running(build(milter, options=BEHIND_PROXY)) as server:
        client = connect(server.port, LOCAL)
        assert client.banner.startswith(b"220")
        assert client.say("QUIT").startswith(b"221")
        named = connect(server.port, ProxyHeader(2, "PROXY", "TCP4", ("192.0.2.7", 1), ("192.0.2.1", 25)).to_bytes())
        assert named.banner == REJECTED
    assert milter.connections == 1


def test_a_health_check_logs_nothing_of_a_filter_that_is_not_there(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    with kept_port() as sock, running(build(f"127.0.0.1:{sock.getsockname()[1]}", options=BEHIND_PROXY)) as server:
        client = connect(server.port, LOCAL)
        assert client.say("QUIT").startswith(b"221")
        client = connect(server.port, LOCAL)
        client.say("EHLO client.example")
        assert client.say("MAIL FROM:<a@b.example>") == UNAVAILABLE
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert line.startswith("milter failed")


def test_mail_of_the_proxy_itself_and_of_clients_that_it_names_later_is_filtered(
    scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter()
    with running(build(milter, options=BEHIND_PROXY)) as server:
        client = connect(server.port, LOCAL)
        client.envelope()
        assert milter.data("connect")[-1].endswith(b"127.0.0.1\0")
        client = connect(server.port, LOCAL)
        client.say("EHLO proxy.example")
        assert client.say("XCLIENT ADDR=192.0.2.7 NAME=client.example PORT=99").startswith(b"220")
    assert milter.data("connect")[-1] == b"client.example\x004\x00\x63192.0.2.7\0"


def test_another_client_that_a_proxy_names_is_reported(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter()
    with running(build(milter, options={"use_xclient": True, "trusted_proxies": ["127.0.0.1"]})) as server:
        client = connect(server.port)
        client.say("EHLO proxy.example")
        assert client.say("XCLIENT ADDR=192.0.2.7 NAME=client.example PORT=99 LOGIN=joe").startswith(b"220")
        client.envelope()
    assert milter.data("connect")[1] == b"client.example\x004\x00\x63192.0.2.7\0"
    assert milter.macros["mail"][b"{auth_type}"] == b"XCLIENT"
    assert milter.macros["mail"][b"{auth_authen}"] == b"joe"


@pytest.mark.parametrize("stage", ["connect", "helo"])
def test_a_client_cannot_be_discarded(stage: str, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(**{stage: DISCARD})
    with running(build(milter)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert client.say("MAIL FROM:<a@b.example>") == UNAVAILABLE


@pytest.mark.parametrize(
    "answer",
    [
        negotiated(1),
        negotiated(7),
        negotiated(actions=0x200),
        negotiated()[:-1],
        packet(b"O", b"short"),
        CONTINUE,
        negotiated(lists=b"\0\0\0"),
        negotiated(lists=b"\0\0\0\0j"),
    ],
)
def test_a_negotiation_that_fails_defers_mail(answer: bytes, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(negotiate=answer)
    with running(build(milter, command_timeout=0.2)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert client.say("MAIL FROM:<a@b.example>") == UNAVAILABLE


def test_unsolicited_data_from_a_filter_is_a_failure(scripted_milter: StartMilter, connect: Connect) -> None:
    """With no answer to MAIL agreed, one that comes might be taken for the answer to RCPT."""
    milter = scripted_milter(negotiate=negotiated(steps=0x4000), mail=CONTINUE, rcpt=b"")
    with running(build(milter)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.say("MAIL FROM:<a@b.example>")
        until(lambda: milter.closed)
        assert client.say("RCPT TO:<c@d.example>") == UNAVAILABLE


def test_changes_before_the_end_of_the_message_are_a_failure(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(eoh=packet(b"h", strings(b"X", b"y")) + CONTINUE)
    with running(build(milter)) as server:
        assert deliver(server, connect) == UNAVAILABLE


def test_changes_that_were_not_agreed_are_a_failure(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(negotiate=negotiated(actions=0x1), end=packet(b"b", b"new") + CONTINUE)
    with running(build(milter)) as server:
        assert deliver(server, connect) == UNAVAILABLE


def test_a_client_that_disconnects_leaves_no_connection_in_use(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(mail=b"")
    with running(build(milter)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.sock.sendall(b"MAIL FROM:<a@b.example>\r\n")
        until(lambda: "mail" in milter.names())
        client.reset()
        milter.answers["mail"] = CONTINUE
        assert deliver(server, connect).startswith(b"250")
    assert milter.connections == 2


@pytest.mark.parametrize("given", [{"failure": "ignore"}, {"command_timeout": 0}, {"connect_timeout": True}])
def test_arguments_that_cannot_work(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="milter: "):
        plugins.milter("127.0.0.1:11332", **given)


@pytest.mark.parametrize("address", ["fd:3", ":11332", "127.0.0.1:0", "11332", "unix:", "a\0b:11332"])
def test_addresses_that_cannot_be_connected_to(address: str) -> None:
    with pytest.raises(ValueError, match=r"write|is not a host name"):
        plugins.milter(address)
