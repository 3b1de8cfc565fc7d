"""A next hop that is slow, or killed under load: nothing piles up, is lost, or is doubled without a reason."""

from __future__ import annotations

import signal
import smtplib
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.proc import memory
from tests.support.programs import Programs
from tests.support.starter import BIN, Process
from tests.support.waiting import until

SENDERS, KILLS = 8, 4


class Sender(threading.Thread):
    """Sends numbered messages, each again until it has its 250; ``unsure`` counts the verdicts that got lost, by message."""

    def __init__(self, port: int, name: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.promised: list[str] = []
        self.unsure: Counter[str] = Counter()
        self.wrong: list[Exception] = []
        self._port, self._name_, self._stop_ = port, name, stop

    def run(self) -> None:
        while not self._stop_.is_set():
            self._send(f"{self._name_}-{len(self.promised)}")

    def _send(self, mark: str) -> None:
        text = f"Subject: {mark}\r\n\r\n" + ("x" * 70 + "\r\n") * 1000 + "end\r\n"
        try:
            with smtplib.SMTP("127.0.0.1", self._port, timeout=60) as smtp:
                smtp.sendmail("a@b.example", ["c@d.example"], text)
                self.promised.append(mark)
        except smtplib.SMTPDataError as error:
            said = error.smtp_error if isinstance(error.smtp_error, str) else error.smtp_error.decode()
            self.unsure[mark] += said.startswith("4.4.2")
            self._refused(error.smtp_code, error)
        except smtplib.SMTPSenderRefused as error:
            self._refused(error.smtp_code, error)
        except smtplib.SMTPRecipientsRefused as error:
            self._refused(error.recipients["c@d.example"][0], error)
        except Exception as error:
            self.wrong.append(error)

    def _refused(self, code: int, error: Exception) -> None:
        if code != 451:
            self.wrong.append(error)
        time.sleep(0.02)  # a client that tries again too soon would only load the machine


@pytest.mark.parametrize(("protocol", "where"), [("smtp", "tcp"), ("lmtp", "unix")])
def test_a_killed_next_hop_loses_nothing_and_doubles_only_messages_without_a_reply(
    programs: Programs, tmp_path: Path, protocol: str, where: str
) -> None:
    address = f"unix:{tmp_path / 'hop'}" if where == "unix" else f"127.0.0.1:{free_port()}"

    def start_hop() -> Process:
        flags = ["--listen", address, "--proxy-protocol", "off", *(["--lmtp"] if protocol == "lmtp" else [])]
        process = programs.start(BIN / "fumi-core", *flags, log="hop.log")
        until(lambda: can_connect(address), "the next hop listening")
        return process

    hop = start_hop()
    port = free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off", "--deliver", f"{protocol}:{address}"]
    front = programs.start(BIN / "fumi-core", *flags, port=port, log="front.log")
    stop = threading.Event()
    senders = [Sender(port, f"client{number}", stop) for number in range(SENDERS)]
    for sender in senders:
        sender.start()
    for _ in range(KILLS):
        wait_for_more(programs, senders)
        programs.stop(hop, signal.SIGKILL)
        hop = start_hop()
    wait_for_more(programs, senders)
    stop.set()
    for sender in senders:
        sender.join(90)
    assert programs.stop(front) == 0
    stored = Counter(mark_of(path) for path in (tmp_path / "maildir" / "new").iterdir())
    assert [sender.wrong for sender in senders] == [[]] * SENDERS
    assert {mark for sender in senders for mark in sender.promised} <= set(stored)
    for sender in senders:
        for mark in {*sender.promised, *sender.unsure}:
            assert stored[mark] <= (mark in sender.promised) + sender.unsure[mark], mark
    assert "Traceback" not in (tmp_path / "front.log").read_text()


def wait_for_more(programs: Programs, senders: list[Sender]) -> None:
    count = sum(len(sender.promised) for sender in senders)
    until(lambda: sum(len(sender.promised) for sender in senders) > count + 30, "30 messages more")


def mark_of(path: Path) -> str:
    """The mark of a message, which must be whole."""
    text = path.read_text()
    assert text.endswith("\nend\n")
    return next(line.removeprefix("Subject: ") for line in text.splitlines() if line.startswith("Subject: "))


def can_connect(address: str) -> bool:
    kind, _, rest = address.partition(":")
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as sock:
        return sock.connect_ex(rest if kind == "unix" else (kind, int(rest))) == 0


def test_a_100_mb_message_to_a_slow_next_hop_takes_no_memory(programs: Programs) -> None:
    module = Path(__file__).with_name("slow_maildir.py")
    (programs.directory / module.name).write_text(module.read_text())
    hop_port, port = free_port(), free_port()
    flags = ["--proxy-protocol", "off", "--listen"]
    programs.start(BIN / "fumi-core", *flags, f"127.0.0.1:{hop_port}", "slow_maildir:app", port=hop_port, log="hop.log")
    flags = [*flags, f"127.0.0.1:{port}", "--deliver", f"smtp:127.0.0.1:{hop_port}"]
    front = programs.start(BIN / "fumi-core", *flags, port=port, log="front.log")
    line = b"x" * 98 + b"\r\n"
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], line * 20_000)
        before = most = memory(front.pid)
        for command in ("MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "DATA"):
            smtp.docmd(command)
        assert smtp.sock is not None
        for _ in range(100):
            smtp.sock.sendall(line * 10_000)
            most = max(most, memory(front.pid))
        assert smtp.docmd(".")[0] == 250
    assert most - before < 5_000_000
    sizes = sorted(path.stat().st_size for path in (programs.directory / "maildir" / "new").iterdir())
    assert 100_000_000 * 0.99 < sizes[-1] < 100_000_000
