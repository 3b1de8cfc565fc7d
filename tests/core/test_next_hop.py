"""What the client says reaches the next hop, and what the next hop says reaches the client; 250 is the next hop's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fumi_core import DataContext, Fumi, MailContext, Next, RcptContext
from fumi_core.client import hop as client_hop
from fumi_core.program import builtin
from fumi_core.testing import RunningServer, running
from tests.core.client import Client, Connect
from tests.core.scripted_hop import StartHop
from tests.support.waiting import until


def front(target: str, **options: Any) -> Fumi:
    return builtin.build(target, name="front.example", close_timeout=0.2, **options)


Serve = Callable[[Fumi], RunningServer]
Chain = Callable[..., tuple[RunningServer, RunningServer]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs apps until the test ends, the last one first."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(running(app))


@pytest.fixture
def chain(serve: Serve) -> Chain:
    """A next hop, which the test may have given handlers, and a server in front of it."""

    def make(hop: Fumi | None = None, protocol: str = "smtp", **options: Any) -> tuple[RunningServer, RunningServer]:
        behind = serve(hop or back(lmtp=protocol == "lmtp"))
        return behind, serve(front(f"{protocol}:127.0.0.1:{behind.port}", **options))

    return make


def back(**options: Any) -> Fumi:
    return Fumi(auth_optional=True, name="hop.example", close_timeout=0.2, **options)


def without_trace(text: bytes) -> bytes:
    """The message after our Received field, which must be there; an empty line comes first if the message has no header."""
    assert text.startswith(b"Received: from client.example ([127.0.0.1])\r\n\tby front.example with "), text[:200]
    lines = text.split(b"\r\n")
    at = next(number for number, line in enumerate(lines[1:], 1) if not line.startswith(b"\t"))
    return b"\r\n".join(lines[at:])


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000, 3_000_000])
def test_a_message_arrives_byte_for_byte_after_our_received_line(chain: Chain, connect: Connect, size: int) -> None:
    text = (b"..dots\r\n.\r\nx.\r\n" + b"x" * 60 + b"\r\n") * (size // 76) + b"." * (size % 76) + b"\r\n" * (size > 0)
    behind, server = chain()
    client = connect(server.port)
    client.envelope("a@b.example", "c@d.example", "e@f.example")
    client.sock.sendall(f"BDAT {len(text)} LAST\r\n".encode() + text)
    assert client.reply().startswith(b"250 ")
    (message,) = behind.messages
    assert without_trace(message.body) == b"\r\n" * (size > 0) + text
    assert message.envelope.mail_from is not None
    assert message.envelope.mail_from.address == "a@b.example"
    assert [each.address for each in message.envelope.rcpt_to] == ["c@d.example", "e@f.example"]
    assert message.session.client_hostname == "front.example"


def test_the_250_has_the_next_hops_text(chain: Chain, connect: Connect) -> None:
    hop = back()
    hop.on_data(lambda ctx, next: ctx.accept("2.6.0 Ok: queued as 4711\nand so on"))
    _, server = chain(hop)
    client = connect(server.port)
    client.envelope()
    client.say("DATA")
    assert client.say("hi\r\n.") == b"250-2.6.0 Ok: queued as 4711\r\n250 2.6.0 and so on\r\n"


def test_each_recipients_refusal_is_the_next_hops_and_the_others_get_the_message(chain: Chain, connect: Connect) -> None:
    hop = back()

    @hop.on_rcpt_to
    def decide(ctx: RcptContext, next: Next) -> Awaitable[None]:
        local, _, _ = ctx.address.address.partition("@")
        if local == "full":
            ctx.reject("4.2.2 Mailbox full", 452)
        if local == "unknown":
            ctx.reject("5.1.1 No such user\nreally", 550)
        return next()

    behind, server = chain(hop)
    client = connect(server.port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<>")
    assert client.say("RCPT TO:<full@d.example>") == b"452 4.2.2 Mailbox full\r\n"
    assert client.say("RCPT TO:<a@d.example>").startswith(b"250")
    assert client.say("RCPT TO:<unknown@d.example>") == b"550-5.1.1 No such user\r\n550 5.1.1 really\r\n"
    assert client.say("RCPT TO:<b@d.example>").startswith(b"250")
    assert client.say("RCPT TO:<a@d.example>").startswith(b"250")
    client.say("DATA")
    assert client.say("hi\r\n.").startswith(b"250")
    (message,) = behind.messages
    assert [each.address for each in message.envelope.rcpt_to] == ["a@d.example", "b@d.example"]


@pytest.mark.parametrize("code", [450, 554])
def test_a_refused_sender_and_a_refused_message_are_refused_here(chain: Chain, connect: Connect, code: int) -> None:
    hop = back()

    @hop.on_mail_from
    def mail(ctx: MailContext, next: Next) -> Awaitable[None]:
        if ctx.address.address.startswith("bad"):
            ctx.reject(f"{code // 100}.7.1 Sender", code)
        return next()

    @hop.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.stream.read()
        ctx.reject(f"{code // 100}.7.1 Content", code)

    behind, server = chain(hop)
    client = connect(server.port)
    client.say("EHLO client.example")
    refusal = f"{code} {code // 100}.7.1".encode()
    assert client.say("MAIL FROM:<bad@b.example>") == refusal + b" Sender\r\n"
    client.envelope()
    client.say("DATA")
    assert client.say("hi\r\n.") == refusal + b" Content\r\n"
    assert behind.messages == []


def test_parameters_go_on_as_they_came(chain: Chain, connect: Connect) -> None:
    behind, server = chain()
    client = connect(server.port)
    client.say("EHLO client.example")
    sender = "MAIL FROM:<ä@b.example> SIZE=100 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=a+2Bb"
    assert client.say(sender).startswith(b"250")
    assert client.say("RCPT TO:<ö@d.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;x+40y").startswith(b"250")
    client.say("DATA")
    assert client.say("Subject: ü\r\n\r\nhi\r\n.").startswith(b"250")
    envelope = behind.messages[0].envelope
    assert envelope.mail_from == (
        "ä@b.example",
        {"SIZE": "100", "BODY": "8BITMIME", "SMTPUTF8": True, "RET": "HDRS", "ENVID": "a+2Bb"},
    )
    assert envelope.rcpt_to == [("ö@d.example", {"NOTIFY": "SUCCESS,DELAY", "ORCPT": "rfc822;x+40y"})]


def test_parameters_that_the_next_hop_does_not_offer_are_left_out(scripted_hop: StartHop, serve: Serve, connect: Connect) -> None:
    hop = scripted_hop(EHLO=b"502 what\r\n")
    server = serve(front(f"smtp:{hop.address}"))
    client = connect(server.port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@b.example> SIZE=100 BODY=8BITMIME RET=HDRS ENVID=a")
    client.say("RCPT TO:<c@d.example> NOTIFY=NEVER")
    assert hop.lines == [b"EHLO front.example", b"HELO front.example", b"MAIL FROM:<a@b.example>", b"RCPT TO:<c@d.example>"]


def test_messages_that_the_next_hop_cannot_carry_are_rejected_at_mail(
    scripted_hop: StartHop, serve: Serve, connect: Connect
) -> None:
    hop = scripted_hop(EHLO=b"250-hop\r\n250 CHUNKING\r\n")
    server = serve(front(f"smtp:{hop.address}"))
    client = connect(server.port)
    client.say("EHLO client.example")
    assert client.say("MAIL FROM:<> BODY=BINARYMIME").startswith(b"554 5.6.3 ")
    assert client.say("MAIL FROM:<> SMTPUTF8").startswith(b"550 5.6.7 ")
    assert hop.lines == [b"EHLO front.example"]


def test_without_8bitmime_plain_text_goes_through_and_nothing_else(
    scripted_hop: StartHop, serve: Serve, connect: Connect
) -> None:
    hop = scripted_hop(EHLO=b"250 hop\r\n")
    server = serve(front(f"smtp:{hop.address}"))
    client = connect(server.port)
    for text, reply in (("plain", b"250 "), ("ü", b"554 5.6.3 ")):
        client.say("EHLO client.example")
        client.say("MAIL FROM:<a@b.example> BODY=8BITMIME")
        client.say("RCPT TO:<c@d.example>")
        client.say("DATA")
        assert client.say(f"Subject: hi\r\n\r\n{text}\r\n.").startswith(reply)
    assert [without_trace(text) for text in hop.messages] == [b"Subject: hi\r\n\r\nplain\r\n"]


def test_a_binary_message_keeps_every_byte(chain: Chain, connect: Connect) -> None:
    text = bytes(range(256)) * 1000 + b"\r\n.\r\n\n.\n\r.\r"
    behind, server = chain()
    client = connect(server.port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<> BODY=BINARYMIME")
    client.say("RCPT TO:<c@d.example>")
    client.sock.sendall(b"BDAT %d\r\n" % len(text) + text)
    assert client.reply().startswith(b"250 ")
    client.sock.sendall(b"BDAT %d LAST\r\n" % len(text) + text)
    assert client.reply().startswith(b"250 ")
    assert without_trace(behind.messages[0].body) == b"\r\n" + text * 2
    assert behind.messages[0].envelope.body == "BINARYMIME"


@pytest.mark.parametrize(
    ("protocol", "promises", "reply"),
    [("smtp", False, b"550 5.7.30 "), ("smtp", True, b"250 "), ("lmtp", False, b"250 ")],
)
def test_requiretls_mail_within_this_host_goes_to_lmtp_and_to_smtp_servers_that_offer_it(
    chain: Chain, connect: Connect, protocol: str, promises: bool, reply: bytes
) -> None:
    hop = back(lmtp=protocol == "lmtp", assume_tls=promises)
    seen: list[bool] = []
    hop.on_mail_from(lambda ctx, next: seen.append(ctx.session.envelope.require_tls))
    _, server = chain(hop, protocol, assume_tls=True)
    client = connect(server.port)
    client.say("EHLO client.example")
    assert client.say("MAIL FROM:<a@b.example> REQUIRETLS").startswith(reply)
    assert seen == ([promises] if reply == b"250 " else [])


def test_connections_are_used_again_across_transactions_and_sessions(
    scripted_hop: StartHop, serve: Serve, connect: Connect
) -> None:
    hop = scripted_hop()
    server = serve(front(f"smtp:{hop.address}"))
    for _ in range(3):
        client = connect(server.port)
        for _ in range(3):
            client.envelope()
            client.say("DATA")
            assert client.say("hi\r\n.") == b"250 2.0.0 Ok: queued as HOP1\r\n"
        client.say("QUIT")
    assert (hop.connections, len(hop.messages)) == (1, 9)
    assert b"RSET" not in hop.lines


@pytest.mark.parametrize("how", ["RSET", "EHLO client.example", "QUIT", "vanish"])
def test_a_transaction_given_up_is_reset_there_at_once(scripted_hop: StartHop, serve: Serve, connect: Connect, how: str) -> None:
    hop = scripted_hop()
    server = serve(front(f"smtp:{hop.address}"))
    client = connect(server.port)
    client.envelope()
    client.close() if how == "vanish" else client.say(how)
    until(lambda: hop.lines[-1] == b"RSET")
    other = connect(server.port)
    other.envelope()
    assert hop.connections == 1


def test_a_rejection_by_an_earlier_handler_is_never_sent_to_the_next_hop(
    scripted_hop: StartHop, serve: Serve, connect: Connect
) -> None:
    hop = scripted_hop()
    app = front(f"smtp:{hop.address}")

    @app.on_rcpt_to
    def refuse(ctx: RcptContext, next: Next) -> None:
        if ctx.address.address.startswith("no"):
            ctx.reject("No", 550)

    client = connect(serve(app).port)
    client.envelope()
    assert client.say("RCPT TO:<no@d.example>").startswith(b"550")
    assert hop.lines[-1] == b"RCPT TO:<c@d.example>"


def test_a_recipient_that_a_handler_rejects_after_the_next_hop_gets_nothing(
    scripted_hop: StartHop, serve: Serve, connect: Connect
) -> None:
    hop = scripted_hop()
    app = front(f"smtp:{hop.address}")

    async def refuse_afterwards(ctx: RcptContext, next: Next) -> None:
        await next()
        if ctx.address.address.startswith("no"):
            ctx.reject("No", 550)

    app._on("rcpt_to", refuse_afterwards, first=True)
    client = connect(serve(app).port)
    client.envelope()
    assert client.say("RCPT TO:<no@d.example>").startswith(b"550")
    client.say("DATA")
    assert client.say("hi\r\n.").startswith(b"451 4.3.5 ")
    assert hop.messages == []


def test_closing_says_goodbye_to_idle_next_hops(scripted_hop: StartHop, connect: Connect) -> None:
    hop = scripted_hop()
    with running(front(f"smtp:{hop.address}")) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.say("hi\r\n.")
        client.say("QUIT")
        assert hop.open == 1
    until(lambda: hop.open == 0)
    assert hop.lines[-1] == b"QUIT"


def test_it_reaches_unix_sockets(scripted_hop: StartHop, serve: Serve, connect: Connect, tmp_path: Path) -> None:
    hop = scripted_hop(str(tmp_path / "hop"))
    client = connect(serve(front(f"smtp:{hop.address}")).port)
    client.envelope()
    client.say("DATA")
    assert client.say("hi\r\n.").startswith(b"250 ")
    assert len(hop.messages) == 1


CARRIED = {"8BITMIME", "BINARYMIME", "DSN", "REQUIRETLS", "SMTPUTF8"}


def offered(client: Client) -> set[str]:
    lines = client.say("EHLO client.example").decode().splitlines()
    return {line[4:].split()[0] for line in lines[1:]} & CARRIED


def greeting(*keywords: str) -> bytes:
    lines = ["hop", *keywords]
    return "".join(f"250{'-' if line is not lines[-1] else ' '}{line}\r\n" for line in lines).encode()


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ((), set()),
        (("8BITMIME",), {"8BITMIME"}),
        (("DSN", "SMTPUTF8", "REQUIRETLS"), {"DSN", "SMTPUTF8", "REQUIRETLS"}),
        (("BINARYMIME",), set()),
        (("BINARYMIME", "CHUNKING"), {"BINARYMIME"}),
        (("8BITMIME", "CHUNKING", "ENHANCEDSTATUSCODES", "PIPELINING"), {"8BITMIME"}),  # Dovecot's LMTP
        ((*sorted(CARRIED), "CHUNKING"), CARRIED),
    ],
    ids=lambda keywords: " ".join(sorted(keywords)) or "nothing",
)
@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_extensions_that_need_the_next_hop_are_offered_as_it_offers_them(
    scripted_hop: StartHop, serve: Serve, connect: Connect, protocol: str, keywords: tuple[str, ...], expected: set[str]
) -> None:
    hop = scripted_hop(**{"EHLO" if protocol == "smtp" else "LHLO": greeting(*keywords)})
    client = connect(serve(front(f"{protocol}:{hop.address}", assume_tls=True)).port)
    assert offered(client) == expected


def test_what_is_offered_changes_with_each_new_connection_to_the_next_hop(
    scripted_hop: StartHop, serve: Serve, connect: Connect
) -> None:
    hop = scripted_hop(EHLO=greeting("SMTPUTF8", "DSN"), dot=[b"250 Ok\r\n", None])
    client = connect(serve(front(f"smtp:{hop.address}")).port)
    assert offered(client) == {"SMTPUTF8", "DSN"}
    hop.answers["EHLO"] = greeting("8BITMIME")
    for expected in ({"SMTPUTF8", "DSN"}, {"8BITMIME"}):
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.").startswith(b"250")
        until(lambda: hop.open == 0)
        assert offered(client) == expected


def test_parameters_of_an_extension_withdrawn_just_now_are_deferred_and_not_rejected(
    scripted_hop: StartHop, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    hop = scripted_hop(EHLO=greeting("SMTPUTF8"), MAIL=None)
    client = connect(serve(front(f"smtp:{hop.address}")).port)
    assert offered(client) == {"SMTPUTF8"}
    hop.answers["EHLO"] = greeting()
    assert client.say("MAIL FROM:<> SMTPUTF8") == b"451 4.6.7 SMTPUTF8 is required, but was not offered by the next hop\r\n"
    monkeypatch.setattr(client_hop, "EHLO_VALID_SECONDS", 0.0)
    assert client.say("MAIL FROM:<> SMTPUTF8").startswith(b"550 5.6.7 ")


def test_before_the_next_hop_has_answered_nothing_is_offered_that_it_may_lack(
    serve: Serve, scripted_hop: StartHop, connect: Connect
) -> None:
    hop = scripted_hop(BANNER=b"421 busy\r\n", EHLO=greeting("DSN"))
    client = connect(serve(front(f"smtp:{hop.address}")).port)
    assert offered(client) == set()
    hop.answers["BANNER"] = b"220 hop\r\n"
    client.envelope()
    assert offered(client) == {"DSN"}


def test_what_options_hide_stays_hidden(scripted_hop: StartHop, serve: Serve, connect: Connect) -> None:
    hop = scripted_hop(EHLO=greeting(*CARRIED, "CHUNKING"))
    hidden = {"hide_dsn": True, "hide_smtputf8": True, "hide_chunking": True, "hide_8bitmime": True, "hide_requiretls": True}
    client = connect(serve(front(f"smtp:{hop.address}", assume_tls=True, **hidden)).port)
    assert offered(client) == set()


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", "dot"])
@pytest.mark.parametrize("reply", [b"530 5.7.0 Must issue a STARTTLS command first", b"535 5.7.8 Authentication failed"])
@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_a_next_hop_that_wants_starttls_or_auth_is_451_and_an_error_in_the_log(
    scripted_hop: StartHop,
    serve: Serve,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    protocol: str,
    reply: bytes,
    command: str,
) -> None:
    hop = scripted_hop(**{command: reply + b"\r\n"})
    client = connect(serve(front(f"{protocol}:{hop.address}")).port)
    client.say("EHLO client.example")
    for line in ("MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "DATA", "hi\r\n."):
        answer = client.say(line)
        if not answer.startswith((b"250", b"354")):
            break
    assert answer == b"451 4.3.5 Next hop does not accept mail from this server, try again later\r\n"
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "next hop requires STARTTLS or AUTH" in record.getMessage()
    assert reply.decode() in str(record.__dict__)
