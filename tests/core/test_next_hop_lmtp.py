"""``lmtp:`` in front of clients that speak LMTP: they get an answer for each recipient."""

from __future__ import annotations

from typing import Any

import pytest

from fumi_core import DataContext, Fumi, Next
from fumi_core.program import builtin
from fumi_core.testing import running
from tests.core.client import Client, Connect
from tests.core.scripted_hop import StartHop


def front(target: str, **options: Any) -> Fumi:
    return builtin.build(target, name="front.example", close_timeout=0.2, **options)


def say_envelope(client: Client, hello: str, *recipients: str) -> None:
    for line in (f"{hello} client.example", "MAIL FROM:<>", *(f"RCPT TO:<{each}>" for each in recipients)):
        assert client.say(line).startswith(b"250"), line


def send(client: Client, count: int) -> list[bytes]:
    client.say("DATA")
    return [client.say("hi\r\n."), *(client.reply() for _ in range(count - 1))]


RECIPIENTS = ("a@d.example", "b@d.example", "c@d.example")


@pytest.mark.parametrize(
    ("answers", "replies"),
    [
        (
            [b"250 2.0.0 Saved\r\n", b"452 4.2.2 Full\r\n", b"550 5.7.1 No\r\n"],
            [b"250 2.0.0 Saved\r\n", b"452 4.2.2 Full\r\n", b"550 5.7.1 No\r\n"],
        ),
        ([b"250 <a> Saved\r\n", b"250 <b> Saved\r\n", b"250 <c> Saved\r\n"], [b"250 2.0.0 Ok\r\n"] * 3),
        ([b"250 Saved\r\n", None], [b"250 2.0.0 Saved\r\n"] + [b"451 4.4.2 Lost connection to the next hop\r\n"] * 2),
        ([b"421 4.3.2 Down\r\n", None], [b"451 4.3.2 Down\r\n"] + [b"451 4.4.2 Lost connection to the next hop\r\n"] * 2),
    ],
    ids=["mixed", "words of their own", "lost after the first", "shut down"],
)
def test_an_lmtp_client_gets_a_reply_for_each_recipient(
    scripted_hop: StartHop, connect: Connect, answers: list[bytes | None], replies: list[bytes]
) -> None:
    hop = scripted_hop(dot=answers)
    with running(front(f"lmtp:{hop.address}", lmtp=True)) as server:
        client = connect(server.port)
        say_envelope(client, "LHLO", *RECIPIENTS)
        assert send(client, 3) == replies
        assert client.say("NOOP").startswith(b"250")
    assert hop.lines[0] == b"LHLO front.example"


def test_an_lmtp_recipient_given_twice_is_one(scripted_hop: StartHop, connect: Connect) -> None:
    hop = scripted_hop()
    with running(front(f"lmtp:{hop.address}", lmtp=True)) as server:
        client = connect(server.port)
        say_envelope(client, "LHLO", "a@d.example", "a@d.example")
        assert send(client, 1) == [b"250 2.0.0 Ok: queued as HOP1\r\n"]
    assert hop.lines.count(b"RCPT TO:<a@d.example>") == 1


@pytest.mark.parametrize(("answer", "reply"), [(b"250 Saved\r\n", b"250 2.0.0 Saved\r\n"), (b"554 No\r\n", b"554 5.7.1 No\r\n")])
def test_an_smtp_next_hops_one_answer_is_every_lmtp_recipients(
    scripted_hop: StartHop, connect: Connect, answer: bytes, reply: bytes
) -> None:
    hop = scripted_hop(dot=answer)
    with running(front(f"smtp:{hop.address}", lmtp=True)) as server:
        client = connect(server.port)
        say_envelope(client, "LHLO", *RECIPIENTS)
        assert send(client, 3) == [reply] * 3
    assert len(hop.messages) == 1


def test_our_own_lmtp_server_takes_it_recipient_by_recipient(connect: Connect) -> None:
    hop = Fumi(auth_optional=True, lmtp=True, name="hop.example", close_timeout=0.2)

    @hop.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.stream.read()
        ctx.reject_recipient("b@d.example", "5.2.2 Full", 552)

    with running(hop) as behind, running(front(f"lmtp:127.0.0.1:{behind.port}", lmtp=True)) as server:
        client = connect(server.port)
        say_envelope(client, "LHLO", *RECIPIENTS)
        assert send(client, 3) == [b"250 2.0.0 Ok\r\n", b"552 5.2.2 Full\r\n", b"250 2.0.0 Ok\r\n"]
        assert behind.messages[0].session.transmission_type == "LMTP"
