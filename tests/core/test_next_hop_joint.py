"""``lmtp:`` in front of clients that speak SMTP: one reply for all recipients, and nobody gets a message twice or not at all."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fumi_core.delivery.next_hop import answer_memory, answer_store
from fumi_core.handlers import spool
from fumi_core.program import builtin
from fumi_core.testing import RunningServer, running

MIXED = b"451-4.2.0 Delivered to "
TEXT = "Subject: hi\r\nMessage-ID: <1@b.example>\r\n\r\nhi\r\n"
OTHER = TEXT.replace("<1@", "<2@")


class Store:
    """An LMTP server that delivers: ``copies`` counts by recipient and text, ``answers`` says what others get, by recipient."""

    def __init__(self, scripted_hop: Any, **answers: Any) -> None:
        self.answers: dict[str, Any] = answers
        self.copies: Counter[tuple[str, str]] = Counter()
        self.hop = scripted_hop(dot=self._deliver, MAIL=self._sender, RCPT=self._recipient)
        self.address = self.hop.address
        self.unknown: set[str] = set()
        self._recipients: list[str] = []

    def _sender(self, line: bytes) -> bytes:
        self._recipients = []
        return b"250 2.1.0 Ok\r\n"

    def _recipient(self, line: bytes) -> bytes:
        (name,) = re.findall(r"<(\w+)@", line.decode())
        if name in self.unknown:
            return b"550 5.1.1 <%b> User unknown\r\n" % name.encode()
        self._recipients.append(name)
        return b"250 2.1.5 Ok\r\n"

    def _deliver(self, text: bytes) -> Iterator[bytes | None]:
        for name in self._recipients:
            answer = self.answers.get(name, "250 2.0.0 Saved")
            answer = answer() if callable(answer) else answer
            if answer is None:
                yield None
                return
            if answer.startswith("250"):
                self.copies[name, text.decode().partition("Subject")[2]] += 1
            code, status, words = answer.split(" ", 2)
            yield f"{code} {status} <{name}> {words}\r\n".encode()

    def copies_of(self, text: str) -> dict[str, int]:
        return {name: count for (name, found), count in self.copies.items() if found == text.partition("Subject")[2]}


@pytest.fixture
def store(scripted_hop: Any) -> Callable[..., Store]:
    return lambda **answers: Store(scripted_hop, **answers)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    with ExitStack() as stack:

        def make(hop: Any, state: Path | None = tmp_path / "state", **options: Any) -> RunningServer:
            app = builtin.build(f"lmtp:{hop.address}", state=state, name="front.example", close_timeout=0.2, **options)
            return stack.enter_context(running(app, record=False))

        yield make


def envelope(client: Any, *names: str, parameters: str = " SIZE=100") -> list[bytes]:
    """The replies to RCPT."""
    assert client.say("EHLO client.example").startswith(b"250")
    assert client.say(f"MAIL FROM:<a@b.example>{parameters}").startswith(b"250")
    return [client.say(f"RCPT TO:<{name}@d.example>") for name in names]


def send(client: Any, *names: str, text: str = TEXT, parameters: str = " SIZE=100") -> bytes:
    """A transaction whose recipients are all accepted: the reply to the message."""
    for reply in envelope(client, *names, parameters=parameters):
        assert reply.startswith(b"250"), reply
    assert client.say("DATA").startswith(b"354")
    return bytes(client.say(f"{text}."))


def rows(state: Path) -> int:
    with sqlite3.connect(state / "answers.sqlite3") as connection:
        return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])


def test_all_recipients_of_a_transaction_get_the_message_at_once(store: Any, front: Any, connect: Any) -> None:
    hop = store()
    client = connect(front(hop).port)
    assert b"LIMITS RCPTMAX=100\r\n" in client.say("EHLO client.example")
    names = [f"r{number}" for number in range(100)]
    assert send(client, *names) == b"250 2.0.0 Ok\r\n"
    assert hop.copies_of(TEXT) == dict.fromkeys(names, 1)
    assert len(hop.hop.messages) == 1


FULL = "552 5.2.2 Quota exceeded"


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
    store: Any, front: Any, connect: Any, tmp_path: Path, answers: Any, reply: bytes
) -> None:
    client = connect(front(store(a=answers[0], b=answers[1])).port)
    assert send(client, "a", "b") == reply


def test_when_the_client_comes_again_each_recipient_gets_what_it_still_needs(
    store: Any, front: Any, connect: Any, tmp_path: Path, eventually: Any
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
    eventually(lambda: rows(tmp_path / "state") == 0)


def test_it_makes_no_difference_how_the_client_groups_recipients_the_second_time(
    store: Any, front: Any, connect: Any, tmp_path: Path, eventually: Any
) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "one", "full", "two").startswith(MIXED)
    assert envelope(client, "full")[0].startswith(b"552 ")
    assert send(client, "one").startswith(b"250 ")
    assert send(client, "new", "two").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"one": 1, "two": 1, "new": 1}
    eventually(lambda: rows(tmp_path / "state") == 0)


def test_another_message_of_the_same_sender_and_size_is_another_message(store: Any, front: Any, connect: Any) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)
    assert send(client, "good", text=OTHER).startswith(b"250 ")
    assert hop.copies_of(OTHER) == {"good": 1}
    assert send(client, "good").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1}


@pytest.mark.parametrize("parameters", [" SIZE=101", " SIZE=100 ENVID=x", ""])
def test_a_recipient_is_rejected_from_memory_only_if_what_clients_repeat_is_the_same(
    store: Any, front: Any, connect: Any, parameters: str
) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)
    assert send(client, "full", text=OTHER, parameters=parameters).startswith(b"552 5.2.2 ")
    assert len(hop.hop.messages) == 2


def test_a_rejection_from_memory_is_used_once(store: Any, front: Any, connect: Any) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)
    del hop.answers["full"]
    assert envelope(client, "full", "full") == [b"552 5.2.2 <full> Quota exceeded\r\n"] * 2
    assert send(client, "full", text=OTHER).startswith(b"250 ")
    assert send(client, "good", "full").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1, "full": 1}


def test_the_same_message_sent_again_after_250_is_delivered_again(store: Any, front: Any, connect: Any) -> None:
    hop = store()
    client = connect(front(hop).port)
    for _ in range(3):
        assert send(client, "a", "b").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"a": 3, "b": 3}


def test_a_next_hop_that_dies_between_answers_gives_no_second_copy(store: Any, front: Any, connect: Any) -> None:
    hop = store(c=None)
    client = connect(front(hop).port)
    assert send(client, "a", "b", "c", "d").startswith(MIXED)
    hop.answers.clear()
    assert send(client, "a", "b", "c", "d").startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys("abcd", 1)


def test_a_next_hop_that_is_down_or_changes_its_mind_the_second_time_is_an_answer_too(
    store: Any, front: Any, connect: Any
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


def test_another_worker_remembers_too(store: Any, front: Any, connect: Any) -> None:
    hop = store(full=FULL)
    one, other = front(hop), front(hop)
    assert send(connect(other.port), "x").startswith(b"250 ")  # it has looked, and knows that nothing is remembered
    assert send(connect(one.port), "good", "full").startswith(MIXED)
    client = connect(other.port)
    assert envelope(client, "good", "full")[1].startswith(b"552 ")
    client.say("DATA")
    assert client.say(f"{TEXT}.").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"x": 1, "good": 1}


@pytest.fixture
def programs(start: Any, free_port: Any, tmp_path: Path) -> Callable[..., list[int]]:
    """The ports of fumi-core processes that deliver to ``hop`` and share a state directory."""

    def run(hop: Any, count: int) -> list[int]:
        ports = [free_port() for _ in range(count)]
        for port in ports:
            listen = ["--proxy-protocol", "off", "--listen", f"127.0.0.1:{port}", "--name", "front.example"]
            start(
                *listen, "--deliver", f"lmtp:{hop.address}", "--state", str(tmp_path / "state"), wait=f"address=127.0.0.1:{port}"
            )
        return ports

    return run


def test_a_core_that_is_killed_between_answers_has_remembered_those_that_came(
    store: Any, start: Any, free_port: Any, connect: Any, eventually: Any, tmp_path: Path
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def never() -> None:
        entered.set()
        go_on.wait(60)

    hop, port = store(c=never), free_port()
    flags = ["--proxy-protocol", "off", "--listen", f"127.0.0.1:{port}", "--deliver", f"lmtp:{hop.address}", "--workers", "2"]
    program = start(*flags)
    client = connect(port)
    envelope(client, "a", "b", "c", "d")
    client.say("DATA")
    client.sock.sendall(f"{TEXT}.\r\n".encode())
    assert entered.wait(60)
    eventually(lambda: rows(tmp_path / "state") == 2)
    program.close()
    assert client.reply() == b""
    go_on.set()
    hop.answers.clear()
    start(*flags)
    assert send(connect(port), "a", "b", "c", "d").startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys("abcd", 1)
    eventually(lambda: rows(tmp_path / "state") == 0)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("again", [("good",), ("good", "other")])
def test_the_same_message_waits_while_it_is_being_delivered(
    store: Any, programs: Any, connect: Any, processes: int, again: tuple[str, ...]
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        go_on.wait(60)
        return FULL

    hop = store(full=slow)
    ports = programs(hop, processes)
    first, second = connect(ports[0]), connect(ports[-1])
    for client, names in ((first, ("good", "full")), (second, again)):
        assert all(reply.startswith(b"250") for reply in envelope(client, *names))
        client.say("DATA")
        client.sock.sendall(f"{TEXT}.\r\n".encode())
        assert entered.wait(60)
    go_on.set()
    assert first.reply().startswith(MIXED)
    # If no answer was known at its MAIL, it was not kept, and the client has to send it once more.
    reply = second.reply()
    assert reply.startswith((b"250 ", b"451 4.2.0 "))
    if reply.startswith(b"451"):
        assert send(second, *again).startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys(again, 1)


def test_a_delivery_that_takes_too_long_defers_the_same_message(
    store: Any, front: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_memory, "OTHER_DELIVERY", 0.1)
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        go_on.wait(60)
        return "250 2.0.0 Saved"

    hop = store(slow=slow)
    server = front(hop)
    first, second = connect(server.port), connect(server.port)
    envelope(first, "good", "slow")
    first.say("DATA")
    first.sock.sendall(f"{TEXT}.\r\n".encode())
    assert entered.wait(60)
    assert send(second, "good", "slow") == b"451 4.2.0 This message is being delivered, try again later\r\n"
    go_on.set()
    assert first.reply().startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1, "slow": 1}


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_a_client_that_has_gone_before_its_250_gets_it_the_next_time(
    store: Any, front: Any, connect: Any, reset: Any, eventually: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        go_on.wait(60)
        return "250 2.0.0 Saved"

    hop = store(a=slow)
    server = front(hop)
    client = connect(server.port)
    envelope(client, *names)
    client.say("DATA")
    client.sock.sendall(f"{TEXT}.\r\n".encode())
    assert entered.wait(60)
    reset(client)
    eventually(lambda: gone(server))
    go_on.set()
    eventually(lambda: rows(tmp_path / "state") == len(names))
    assert send(connect(server.port), *names).startswith(b"250 ")
    assert hop.copies_of(TEXT) == dict.fromkeys(names, 1)


def gone(server: RunningServer) -> bool:
    """Whether the server has noticed that its client has gone."""
    (connection,) = server.app._server.connections  # type: ignore[union-attr]
    dialogue = connection._dialogue
    return dialogue is not None and dialogue.closed


def test_a_client_that_gives_up_the_second_time_changes_nothing(store: Any, front: Any, connect: Any, eventually: Any) -> None:
    hop = store(slow="451 4.2.1 Later")
    server = front(hop)
    assert send(connect(server.port), "good", "slow").startswith(MIXED)
    client = connect(server.port)
    envelope(client, "good", "slow")
    client.say("DATA")
    client.sock.sendall(TEXT.encode())
    client.close()
    eventually(lambda: len(server.app._server.connections) == 1)
    del hop.answers["slow"]
    assert send(connect(server.port), "good", "slow").startswith(b"250 ")
    assert hop.copies_of(TEXT) == {"good": 1, "slow": 1}


@pytest.mark.parametrize("size", [10, 200_000, 3_000_000])
def test_a_message_that_is_kept_is_passed_on_byte_for_byte(store: Any, front: Any, connect: Any, size: int) -> None:
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


def test_a_client_that_pipelines_is_answered_in_order(store: Any, front: Any, connect: Any) -> None:
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


def test_no_room_for_a_message_that_must_be_kept_is_452(
    store: Any, front: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    hop = store(slow="451 4.2.1 Later")
    client = connect(front(hop).port)
    assert send(client, "good", "slow").startswith(MIXED)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    large = TEXT + ("x" * 70 + "\r\n") * 10_000
    assert send(client, "good", "slow", text=large) == b"452 4.3.1 Insufficient system storage\r\n"
    del hop.answers["slow"]
    assert send(client, "good", "slow").startswith(b"250 ")


# Where nothing can be remembered


def spoil(state: Path, how: str) -> None:
    if how == "a file":
        state.write_text("")
    elif how == "no database":
        state.mkdir()
        (state / "answers.sqlite3").write_bytes(b"not a database, by any means" * 1000)
    elif how == "another's":
        state.mkdir()
        with sqlite3.connect(state / "answers.sqlite3") as connection:
            connection.execute("CREATE TABLE mine (words TEXT)")
    else:
        state.mkdir()
        (state / "answers.sqlite3").mkdir()


@pytest.mark.parametrize("how", ["a file", "no database", "another's", "a directory"])
def test_without_a_memory_the_start_warns_and_answers_that_differ_are_451_for_all(
    store: Any, front: Any, connect: Any, tmp_path: Path, caplog: Any, how: str
) -> None:
    spoil(tmp_path / "state", how)
    hop = store(full=FULL)
    client = connect(front(hop).port)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("cannot remember answers that differ")
    for _ in range(2):
        assert send(client, "good", "full").startswith(MIXED)
    assert send(client, "good", "fine").startswith(b"250 ")
    if how == "another's":
        with sqlite3.connect(tmp_path / "state/answers.sqlite3") as connection:
            assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("mine",)]


def test_a_database_that_breaks_later_is_one_warning_and_no_wrong_reply(
    store: Any, front: Any, connect: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hop = store(full=FULL)
    client = connect(front(hop).port)
    assert send(client, "good", "full").startswith(MIXED)

    def full(*arguments: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(answer_store.AnswerStore, "_open", full)
    monkeypatch.setattr(answer_store.AnswerStore, "_bound", full)
    for _ in range(3):
        assert send(client, "one", "full", text=OTHER, parameters="").startswith(MIXED)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "cannot remember answers to recipients" in warnings[0]
    assert send(client, "one", "fine").startswith(b"250 ")
    monkeypatch.undo()
    assert send(client, "good").startswith(b"250 ")
    assert hop.copies_of(TEXT)["good"] == 1


def test_old_answers_and_too_many_are_forgotten(
    store: Any, front: Any, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_store, "MOST", 10)
    hop = store(full=FULL)
    client = connect(front(hop).port)
    for number in range(30):
        text, parameters = TEXT + f"{number}\r\n", f" SIZE={number}"
        assert send(client, f"good{number}", "full", text=text, parameters=parameters).startswith(MIXED)
        assert rows(tmp_path / "state") <= 11
    with sqlite3.connect(tmp_path / "state/answers.sqlite3") as connection:
        connection.execute("UPDATE answers SET time = time - ?", [answer_store.KEPT])
    del hop.answers["full"]
    assert send(client, "full", text=TEXT + "29\r\n", parameters=" SIZE=29").startswith(b"250 ")
    hop.answers["full"] = FULL
    assert send(client, "good", "full").startswith(MIXED)
    assert rows(tmp_path / "state") == 2


def test_an_lmtp_client_needs_no_memory(store: Any, front: Any, connect: Any, tmp_path: Path) -> None:
    front(store(), lmtp=True)
    assert not (tmp_path / "state").exists()
