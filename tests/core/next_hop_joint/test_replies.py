"""``lmtp:`` with SMTP clients: one reply for all recipients, and each recipient gets a message exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.client import Connect
from tests.core.next_hop_joint.delivery import FULL, MIXED, OTHER, TEXT, Front, MakeStore, envelope, rows, send
from tests.support.waiting import until


def test_all_recipients_of_a_transaction_get_the_message_at_once(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store()
    client = connect(front(hop).port)
    assert b"LIMITS RCPTMAX=100\r\n" in client.say("EHLO client.example")
    names = [f"r{number}" for number in range(100)]
    assert send(client, *names) == b"250 2.0.0 Ok\r\n"
    assert hop.copies_of(TEXT) == dict.fromkeys(names, 1)
    assert len(hop.hop.messages) == 1


@pytest.mark.parametrize(
    ("answers", "reply"),
    [
        ([FULL, FULL], b"552-5.2.2 <a> Quota exceeded\r\n552 5.2.2 <b> Quota exceeded\r\n"),
        (["452 4.2.2 Full", "452 4.2.2 Full"], b"452-4.2.2 <a> Full\r\n452 4.2.2 <b> Full\r\n"),
        (
            [FULL, "550 5.7.1 No"],
            b"554-5.2.0 Not delivered to any recipient\r\n554-5.2.0 <a@d.example>: 552 5.2.2 <a> Quota exceeded\r\n"
            b"554 5.2.0 <b@d.example>: 550 5.7.1 <b> No\r\n",
        ),
        ([None, None], b"451 4.4.2 Lost connection to the next hop\r\n"),
    ],
    ids=["rejected", "deferred", "rejected differently", "lost"],
)
def test_answers_that_agree_are_the_reply(
    store: MakeStore, front: Front, connect: Connect, tmp_path: Path, answers: list[str | None], reply: bytes
) -> None:
    client = connect(front(store(a=answers[0], b=answers[1])).port)
    assert send(client, "a", "b") == reply


def test_when_the_client_comes_again_each_recipient_gets_what_it_still_needs(
    store: MakeStore, front: Front, connect: Connect, tmp_path: Path
) -> None:
    hop = store(full=FULL, slow="451 4.2.1 Later")
    client = connect(front(hop).port)
    reply = send(client, "good", "full", "slow", "fine")
    assert reply.startswith(b"451-4.2.0 Delivered to 2 of 4 recipients, try again later for the others\r\n")
    assert b"<full@d.example>: 552 5.2.2 <full> Quota exceeded\r\n" in reply
    hop.answers["slow"] = "250 2.0.0 Saved"
    good, full, slow, fine = envelope(client, "good", "full", "slow", "fine")
    assert (good[:3], full, slow[:3], fine[:3]) == (b"250", b"552 5.2.2 <full> Quota exceeded\r\n", b"250", b"250")
    client.say("DATA")
    assert client.say(f"{TEXT}.").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1, "slow": 1, "fine": 1}
    until(lambda: rows(tmp_path / "state") == 0)


def test_it_makes_no_difference_how_the_client_groups_recipients_the_second_time(
    store: MakeStore, front: Front, connect: Connect, tmp_path: Path
) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "one", "full", "two").startswith(MIXED)
    assert envelope(client, "full")[0].startswith(b"552 ")
    assert send(client, "one").startswith(b"250 ")
    assert send(client, "new", "two").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"one": 1, "two": 1, "new": 1}
    until(lambda: rows(tmp_path / "state") == 0)


def test_another_message_of_the_same_sender_and_size_is_another_message(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)
    assert send(client, "good", text=OTHER).startswith(b"250 ")
    assert hop.copies_of(OTHER) == {"good": 1}
    assert send(client, "good").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1}


@pytest.mark.parametrize("parameters", [" SIZE=101", " SIZE=100 ENVID=x", ""])
def test_a_recipient_is_rejected_from_memory_only_if_what_clients_repeat_is_the_same(
    store: MakeStore, front: Front, connect: Connect, parameters: str
) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)
    assert send(client, "full", text=OTHER, parameters=parameters).startswith(b"552 5.2.2 ")
    assert len(hop.hop.messages) == 2


def test_a_rejection_from_memory_is_used_once(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)
    del hop.answers["full"]
    assert envelope(client, "full", "full") == [b"552 5.2.2 <full> Quota exceeded\r\n"] * 2
    assert send(client, "full", text=OTHER).startswith(b"250 ")
    assert send(client, "good", "full").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1, "full": 1}


def test_the_same_message_sent_again_after_250_is_delivered_again(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store()
    client = connect(front(hop).port)
    for _ in range(3):
        assert send(client, "a", "b").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"a": 3, "b": 3}


def test_a_next_hop_that_dies_between_answers_gives_no_second_copy(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store(c=None)
    client = connect(front(hop).port)
    assert send(client, "a", "b", "c", "d").startswith(MIXED)
    hop.answers.clear()
    assert send(client, "a", "b", "c", "d").startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys("abcd", 1)


def test_a_next_hop_that_is_down_or_changes_its_mind_the_second_time_is_an_answer_too(
    store: MakeStore, front: Front, connect: Connect
) -> None:
    hop = store(slow="451 4.2.1 Later")
    client = connect(front(hop).port)
    assert send(client, "good", "slow").startswith(MIXED)
    hop.unknown = {"slow"}
    assert envelope(client, "good", "slow")[1].startswith(b"550 5.1.1 ")
    hop.unknown = set()
    client.say("RSET")
    assert len(envelope(client, "good", "slow")) == 2
    hop.unknown = {"slow"}
    client.say("DATA")
    assert b"<slow@d.example>: 550 5.1.1 <slow> User unknown" in client.say(f"{TEXT}.")
    assert envelope(client, "good", "slow")[1].startswith(b"550 5.1.1 ")
    client.say("DATA")
    assert client.say(f"{TEXT}.").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1}


def test_another_worker_remembers_too(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store(full=FULL)
    one, other = front(hop), front(hop)
    assert send(connect(other.port), "x").startswith(b"250 ")  # it has looked, and knows that nothing is remembered
    assert send(connect(one.port), "good", "full").startswith(MIXED)
    client = connect(other.port)
    assert envelope(client, "good", "full")[1].startswith(b"552 ")
    client.say("DATA")
    assert client.say(f"{TEXT}.").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"x": 1, "good": 1}


@pytest.mark.parametrize("size", [10, 200_000, 3_000_000])
def test_a_message_that_is_kept_is_passed_on_byte_for_byte(store: MakeStore, front: Front, connect: Connect, size: int) -> None:
    text = TEXT + "..dots\r\n" + ("x" * 70 + "\r\n") * (size // 72)
    data = text.encode()
    hop = store(slow="451 4.2.1 Later")
    client = connect(front(hop).port)

    def chunks() -> bytes:
        envelope(client, "good", "slow")
        client.sock.sendall(b"BDAT %d\r\n%b" % (len(data) // 2, data[: len(data) // 2]))
        assert client.reply().startswith(b"250")
        client.sock.sendall(b"BDAT %d LAST\r\n%b" % (len(data) - len(data) // 2, data[len(data) // 2 :]))
        return bytes(client.reply())

    assert chunks().startswith(MIXED)
    del hop.answers["slow"]
    assert chunks().startswith(b"250 ")
    first, second = hop.hop.messages
    assert first.partition(b"Subject")[2] == second.partition(b"Subject")[2] == text.replace("\r\n.", "\r\n..").encode()[7:]
    assert {name: count for (name, _), count in hop.copies.items()} == {"good": 1, "slow": 1}


def test_a_client_that_pipelines_is_answered_in_order(store: MakeStore, front: Front, connect: Connect) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    transaction = "MAIL FROM:<a@b.example> SIZE=100\r\nRCPT TO:<good@d.example>\r\nRCPT TO:<full@d.example>\r\nDATA\r\n"
    client.say("EHLO client.example")
    client.sock.sendall(transaction.encode())
    assert [client.reply()[:3] for _ in range(4)] == [b"250", b"250", b"250", b"354"]
    client.sock.sendall(f"{TEXT}.\r\n{transaction}".encode())
    assert [client.reply()[:3] for _ in range(5)] == [b"451", b"250", b"250", b"552", b"354"]
    assert client.say(f"{TEXT}.").startswith(b"250")
    assert hop.copies_of(TEXT) == {"good": 1}
