"""Many clients at once, huge messages, and a core that dies under them: nothing is lost, doubled or half there."""

from __future__ import annotations

import asyncio
import signal
import smtplib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.proc import memory
from tests.support.programs import Programs, Setup
from tests.support.starter import BIN
from tests.support.waiting import until

CLIENTS, EACH = 200, 20
PATIENCE = 280
"""Seconds, which is less than what a test has."""


async def send_by_starttls(port: int, context: ssl.SSLContext, client: int) -> None:
    """One client's session: STARTTLS, then its messages, each checked to be answered 250."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def say(line: bytes, code: bytes) -> None:
        writer.write(line)
        reply = await reader.readline()
        while reply[3:4] == b"-":
            reply = await reader.readline()
        assert reply.startswith(code), reply

    await say(b"", b"220")
    await say(b"EHLO me\r\n", b"250")
    await say(b"STARTTLS\r\n", b"220")
    await writer.start_tls(context, server_hostname="localhost", ssl_handshake_timeout=PATIENCE)
    await say(b"EHLO me\r\n", b"250")
    for number in range(EACH):
        await say(b"MAIL FROM:<a@b.example>\r\n", b"250")
        await say(b"RCPT TO:<c@d.example>\r\n", b"250")
        await say(b"DATA\r\n", b"354")
        await say(b"Subject: %d-%d\r\n\r\nhello\r\n.\r\n" % (client, number), b"250")
    await say(b"QUIT\r\n", b"221")
    writer.close()


def test_200_starttls_clients_send_20_messages_each(two_processes: Callable[..., Setup], certificate: CertificateFiles) -> None:
    # All shake hands at the same time, and so each of them takes as long as all.
    setup = two_processes("--handshake-timeout", str(PATIENCE))
    context = ssl.create_default_context(cafile=str(certificate[0]))

    async def everybody() -> None:
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(send_by_starttls(setup.starttls_port, context, client) for client in range(CLIENTS)))

    asyncio.run(everybody())
    texts = Counter(message.text for message in setup.maildir.messages())
    assert len(texts) == CLIENTS * EACH
    assert set(texts.values()) == {1}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_200_mb_message_into_a_slow_maildir_takes_no_memory(
    programs: Programs, certificate: CertificateFiles, processes: int
) -> None:
    module = Path(__file__).with_name("slow_maildir.py")
    (programs.directory / module.name).write_text(module.read_text())
    port = free_port()
    flags = ["--cert", str(certificate[0]), "--key", str(certificate[1]), "--listen", f"127.0.0.1:{port}"]
    if processes == 1:
        watched = [programs.start(BIN / "fumi-edge", *flags, "slow_maildir:app", port=port, log="edge.log")]
    else:
        core_port = free_port()
        of_core = ["--listen", f"127.0.0.1:{core_port}", "--proxy-protocol", "required", "slow_maildir:app"]
        core = programs.start(BIN / "fumi-core", *of_core, port=core_port, log="core.log")
        edge = programs.start(BIN / "fumi-edge", *flags, "--backend", f"127.0.0.1:{core_port}", port=port, log="edge.log")
        watched = [core, edge]
    context = ssl.create_default_context(cafile=str(certificate[0]))
    line = b"x" * 98 + b"\r\n"
    with smtplib.SMTP_SSL("localhost", port, context=context) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], line * 20_000)
        before = {process.pid: memory(process.pid) for process in watched}
        most = dict(before)
        smtp.mail("a@b.example")
        smtp.rcpt("c@d.example")
        smtp.docmd("DATA")
        assert smtp.sock is not None
        for _ in range(200):
            smtp.sock.sendall(line * 10_000)
            for process in watched:
                most[process.pid] = max(most[process.pid], memory(process.pid))
        assert smtp.docmd(".")[0] == 250
    grown = [most[pid] - before[pid] for pid in before]
    assert max(grown) < 5_000_000
    sizes = sorted(path.stat().st_size for path in (programs.directory / "maildir" / "new").iterdir())
    assert 200_000 * 990 < sizes[-1] < 200_000 * 1000


class Sender(threading.Thread):
    """Sends numbered messages one by one, again until each has its 250; remembers which had it."""

    def __init__(self, port: int, context: ssl.SSLContext, name: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.promised: list[str] = []
        self._port, self._trust, self._name_, self._stop_ = port, context, name, stop

    def run(self) -> None:
        number = 0
        while not self._stop_.is_set() or number == 0:
            mark = f"{self._name_}-{number}"
            if self._send(mark):
                self.promised.append(mark)
                number += 1

    def _send(self, mark: str) -> bool:
        text = f"Subject: {mark}\r\n\r\n" + ("x" * 70 + "\r\n") * 2000 + "end\r\n"
        try:
            with smtplib.SMTP("127.0.0.1", self._port, timeout=20) as smtp:
                smtp.starttls(context=self._trust)
                smtp.sendmail("a@b.example", ["c@d.example"], text)
                return True
        except (OSError, smtplib.SMTPException):
            time.sleep(0.02)  # a client that tries again too soon would only load the machine
            return False


def await_more(senders: Sequence[Sender], count: int) -> None:
    """Wait until so many more messages have been accepted."""
    enough = sum(len(sender.promised) for sender in senders) + count
    until(lambda: sum(len(sender.promised) for sender in senders) > enough, f"{count} messages more")


def test_a_core_killed_under_load_keeps_its_promises_and_clients_get_through_again(
    two_processes: Callable[..., Setup], programs: Programs, certificate: CertificateFiles
) -> None:
    setup = two_processes()
    core = setup.processes["core"]
    stop = threading.Event()
    context = ssl.create_default_context(cafile=str(certificate[0]))
    senders = [Sender(setup.starttls_port, context, f"client{number}", stop) for number in range(8)]
    for sender in senders:
        sender.start()
    for _ in range(3):
        await_more(senders, 20)
        programs.stop(core, signal.SIGKILL)
        port = int(str(core.args[2]).rpartition(":")[2])
        core = programs.start(*core.args, port=port, log="core.log")
    await_more(senders, 20)
    stop.set()
    for sender in senders:
        sender.join(60)
    stored = Counter(message.text.split(b"\n", 1)[0].decode().removeprefix("Subject: ") for message in setup.maildir.messages())
    promised = [mark for sender in senders for mark in sender.promised]
    assert set(promised) <= set(stored)
    assert all(message.text.endswith(b"\nend\n") for message in setup.maildir.messages())
    # Safe, but killed before the 250 got out: the client sent it again. At most one a client and kill.
    assert sum(stored.values()) - len(stored) <= 3 * len(senders)


def test_no_backend_is_421_over_tls(
    two_processes: Callable[..., Setup], programs: Programs, certificate: CertificateFiles
) -> None:
    setup = two_processes()
    programs.stop(setup.processes["core"], signal.SIGKILL)
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with socket.create_connection(("127.0.0.1", setup.tls_port)) as raw:
        raw.settimeout(20)
        with context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
            assert sock.recv(1000).startswith(b"421 4.3.2 ")
            assert sock.recv(1000) == b""
