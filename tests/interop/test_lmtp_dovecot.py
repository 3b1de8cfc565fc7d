"""Many recipients through fumi-core to Dovecot's LMTP server, from clients with a queue (Postfix) and without one (msmtp).

Each good recipient has exactly one copy in the end, whatever was killed meanwhile; each bad one is bounced, by the client, alone.
"""

from __future__ import annotations

import contextlib
import re
import signal
import smtplib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.interop.mail_servers import Dovecot, LMTPProxy, Postfix
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

GOOD = [f"good{number}" for number in range(50)]
MARK = "the text of this message"
MAIL = f"From: sender@d.example\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\nMessage-ID: <1@d.example>\r\n\r\n{MARK}\r\n"


class Core:
    """fumi-core, which delivers to Dovecot."""

    def __init__(self, programs: Programs, next_hop: int) -> None:
        self.port: int = free_port()
        self._programs, self._next_hop = programs, next_hop
        self.start()

    def start(self) -> None:
        flags = ["--proxy-protocol", "off", "--listen", f"127.0.0.1:{self.port}", "--deliver", f"lmtp:127.0.0.1:{self._next_hop}"]
        self.process = self._programs.start(BIN / "fumi-core", *flags, port=self.port, log="core.log")

    def kill(self) -> None:
        self._programs.stop(self.process, signal.SIGKILL)

    @property
    def remembered(self) -> int:
        """How many answers are in its database."""
        path: Path = self._programs.directory / "state" / "answers.sqlite3"
        with sqlite3.connect(path) as connection:
            return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])


class Chain:
    """Postfix, fumi-core, Dovecot. The sender has a mailbox too, for bounces."""

    def __init__(self, programs: Programs, place: Path, full: Sequence[str], stop_after: int | None) -> None:
        """With ``stop_after`` there is a proxy in front of Dovecot, which stops after so many answers."""
        self.dovecot = Dovecot(programs, place, ["sender", *GOOD], full)
        self.proxy = LMTPProxy(self.dovecot.port, stop_after)
        self.core = Core(programs, self.dovecot.port if stop_after is None else self.proxy.port)
        self.postfix = Postfix(programs, place, self.core.port)
        self._programs = programs

    def send(self, names: Sequence[str]) -> None:
        with smtplib.SMTP("127.0.0.1", self.postfix.port, timeout=60) as smtp:
            smtp.sendmail("sender@d.example", [f"{name}@d.example" for name in names], MAIL)

    def settled(self, names: Sequence[str]) -> dict[str, set[str]]:
        """The recipients in the end, by what became of them; each has become one thing, once."""

        def ends() -> dict[str, list[str]]:
            outcomes = self.postfix.outcomes("d.example")
            final = {name: [each for each in counts.elements() if each != "deferred"] for name, counts in outcomes.items()}
            return {name: final.get(name, []) for name in names}

        until(lambda: all(ends().values()), "an end for each recipient", 120)
        assert {name: len(each) for name, each in ends().items()} == dict.fromkeys(names, 1)
        return {outcome: {name for name, each in ends().items() if each == [outcome]} for outcome in ("sent", "bounced")}

    def copies(self) -> dict[str, int]:
        """How often each recipient has the message. The sender has it only in bounces."""
        copies: dict[str, int] = self.dovecot.copies(MARK)
        copies.pop("sender", None)
        return copies

    def bounced(self, count: int) -> list[str]:
        """The recipients that bounces to the sender name, once there are so many."""

        def named() -> list[str]:
            text = "".join(path.read_text() for path in self.dovecot.directory.glob("mail/sender/new/*"))
            return sorted(re.findall(r"^Final-Recipient: rfc822; (\w+)@", text, re.MULTILINE))

        until(lambda: len(named()) >= count, "bounces")
        return named()


@pytest.fixture
def place(programs: Programs) -> Iterator[Path]:
    """A directory that all users may enter, as they may not enter pytest's."""
    with tempfile.TemporaryDirectory(prefix="fumi-mail-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)
        programs.close()


@pytest.fixture
def chain(programs: Programs, place: Path) -> Iterator[Callable[..., Chain]]:
    with contextlib.ExitStack() as stack:

        def make(full: Sequence[str] = (), stop_after: int | None = None) -> Chain:
            made = Chain(programs, place, full, stop_after)
            stack.callback(made.proxy.close)
            return made

        yield make


UNKNOWN = [f"unknown{number}" for number in range(5)]
FULL = [f"full{number}" for number in range(5)]


def mixed(*bad: Sequence[str]) -> list[str]:
    """50 recipients, the bad ones among the good."""
    names = [name for each in bad for name in each]
    good = GOOD[: 50 - len(names)]
    for at, name in enumerate(names):
        good.insert(at * 7, name)
    return good


@pytest.mark.parametrize(
    ("unknown", "full"), [([], []), (UNKNOWN, []), ([], FULL), (UNKNOWN, FULL)], ids=["all good", "unknown", "full", "both"]
)
def test_fifty_recipients_of_postfix_get_one_copy_or_one_bounce(
    chain: Callable[..., Chain], programs: Programs, unknown: list[str], full: list[str]
) -> None:
    setup, names, bad = chain(full), mixed(unknown, full), {*unknown, *full}
    setup.send(names)
    assert setup.settled(names) == {"sent": set(names) - bad, "bounced": bad}
    assert setup.copies() == dict.fromkeys(set(names) - bad, 1)
    deferred = {counts["deferred"] for counts in setup.postfix.outcomes("d.example").values()}
    assert deferred <= ({0, 1} if full else {0})  # one more try is all that it takes
    assert setup.bounced(len(bad)) == sorted(bad)
    until(lambda: setup.core.remembered == 0, "nothing left to remember")


@pytest.mark.parametrize("killed", [{"Dovecot"}, {"core"}, {"core", "Dovecot"}], ids="+".join)
@pytest.mark.parametrize("full", [[], FULL], ids=["all good", "full"])
def test_a_kill_between_replies_causes_no_second_copy_and_no_loss(
    chain: Callable[..., Chain], programs: Programs, killed: set[str], full: list[str]
) -> None:
    names = mixed(full)
    setup = chain(full, stop_after=30)
    setup.send(names)
    assert setup.proxy.waiting.wait(60)
    until(lambda: setup.core.remembered == 30, "30 answers remembered")
    if "core" in killed:
        setup.core.kill()
    if "Dovecot" in killed:
        setup.dovecot.kill()
    setup.proxy.break_off()
    if "Dovecot" in killed:
        setup.dovecot.start()
    if "core" in killed:
        setup.core.start()
    assert setup.settled(names) == {"sent": set(names) - {*full}, "bounced": {*full}}
    assert setup.copies() == dict.fromkeys(set(names) - {*full}, 1)
    assert setup.bounced(len(full)) == sorted(full)
    until(lambda: setup.core.remembered == 0, "nothing left to remember")


@pytest.fixture
def msmtp(programs: Programs) -> Callable[..., str]:
    def run(port: int, *names: str, status: int = 0) -> str:
        words = ["--host=127.0.0.1", f"--port={port}", "--from=sender@d.example", "--domain=client.example"]
        recipients = [f"{name}@d.example" for name in names]
        said: str = programs.run("msmtp", *words, *recipients, given=MAIL.replace("\r\n", "\n").encode(), status=status)
        return said

    return run


RECIPIENT_REJECTED, MESSAGE_REJECTED = 65, 69


def test_msmtp_sends_to_fifty_recipients_at_once(programs: Programs, place: Path, msmtp: Callable[..., str]) -> None:
    dovecot = Dovecot(programs, place, GOOD)
    msmtp(Core(programs, dovecot.port).port, *GOOD)
    assert dovecot.copies(MARK) == dict.fromkeys(GOOD, 1)


def test_msmtp_gets_the_rejection_of_an_unknown_recipient_at_once(
    programs: Programs, place: Path, msmtp: Callable[..., str]
) -> None:
    dovecot = Dovecot(programs, place, GOOD)
    said = msmtp(Core(programs, dovecot.port).port, *GOOD[:3], "unknown", status=RECIPIENT_REJECTED)
    assert "550 5.1.1" in said
    assert dovecot.copies(MARK) == {}


def test_msmtp_gets_a_reply_for_each_recipient_and_may_send_the_message_again(
    programs: Programs, place: Path, msmtp: Callable[..., str]
) -> None:
    dovecot = Dovecot(programs, place, GOOD, ["full"])
    core = Core(programs, dovecot.port)
    said = msmtp(core.port, *GOOD[:3], "full", status=MESSAGE_REJECTED)
    assert "Delivered to 3 of 4 recipients" in said
    assert "<full@d.example>: 552 5.2.2" in said
    assert "Quota exceeded" in msmtp(core.port, *GOOD[:3], "full", status=RECIPIENT_REJECTED)
    msmtp(core.port, *GOOD[:5])
    assert dovecot.copies(MARK) == dict.fromkeys(GOOD[:5], 1)
