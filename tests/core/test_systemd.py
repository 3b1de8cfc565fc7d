"""fumi-core as a service of systemd: its notifications, and the watchdog."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fumi_core.runtime.systemd
from fumi_core.runtime.systemd import Notifier
from tests.core.client import Connect
from tests.core.programs import Program, Start
from tests.support.ports import free_port
from tests.support.proc import children
from tests.support.waiting import until


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self._sock.settimeout(60)
        self.environment = {"NOTIFY_SOCKET": address}

    def hear(self) -> str:
        return self._sock.recv(4096).decode()

    def busy(self) -> int:
        """Fill its queue; with how many datagrams."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
            for number in itertools.count():
                try:
                    other.sendto(b"other", self._sock.getsockname())
                except BlockingIOError:
                    return number
        raise AssertionError

    def silent(self, seconds: float) -> bool:
        self._sock.settimeout(seconds)
        try:
            self.hear()
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@fumi-test-{os.getpid()}-{tmp_path.name}"
    with contextlib.closing(Systemd(address)) as systemd:
        yield systemd


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_is_notified_of_start_reload_and_stop(systemd: Systemd, start: Start, workers: str) -> None:
    port = free_port()
    flags = ("--listen", f"127.0.0.1:{port}", "--deliver", "discard:", "--workers", workers)
    program = start(*flags, environment=systemd.environment)
    assert systemd.hear() == "READY=1"
    before = time.monotonic_ns() // 1000
    program.process.send_signal(signal.SIGHUP)
    found = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", systemd.hear())
    assert found
    assert before <= int(found[1]) <= time.monotonic_ns() // 1000
    assert systemd.hear() == "READY=1"
    program.process.send_signal(signal.SIGTERM)
    assert systemd.hear() == "STOPPING=1"
    assert program.process.wait(60) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_program_that_stops_does_not_reload(systemd: Systemd, start: Start, connect: Connect, workers: str) -> None:
    port = free_port()
    flags = ("--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off", "--deliver", "discard:", "--workers", workers)
    program = start(*flags, environment=systemd.environment)
    assert systemd.hear() == "READY=1"
    client = connect(port)
    client.envelope()
    assert client.say("DATA").startswith(b"354")
    program.process.send_signal(signal.SIGTERM)
    assert systemd.hear() == "STOPPING=1"
    program.process.send_signal(signal.SIGHUP)
    until(lambda: not pending(program.process.pid, signal.SIGHUP))
    assert client.say(".").startswith(b"250")
    client.close()
    assert program.process.wait(60) == 0
    assert systemd.silent(0.1)


def pending(pid: int, number: int) -> bool:
    """Whether a process has still to take this signal."""
    found = re.search(r"ShdPnd:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_reload_that_fails_ends_too(systemd: Systemd, start: Start, tmp_path: Path, workers: str) -> None:
    (tmp_path / "users").write_text("")
    flags = ("--listen", f"127.0.0.1:{free_port()}", "--deliver", "discard:", "--users", "users", "--workers", workers)
    program = start(*flags, environment=systemd.environment)
    assert systemd.hear() == "READY=1"
    (tmp_path / "users").write_text("wrong")
    program.process.send_signal(signal.SIGHUP)
    assert systemd.hear().startswith("RELOADING=1")
    assert systemd.hear() == "READY=1"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_watchdog_is_fed(systemd: Systemd, start: Start, workers: str) -> None:
    flags = ("--listen", f"127.0.0.1:{free_port()}", "--deliver", "discard:", "--workers", workers)
    start(*flags, environment={**systemd.environment, "WATCHDOG_USEC": "100000"})
    while (heard := systemd.hear()) != "READY=1":
        assert heard == "WATCHDOG=1"  # the master lives before its workers serve
    assert [systemd.hear() for _ in range(5)] == ["WATCHDOG=1"] * 5


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_watchdog_is_not_fed_by_a_program_that_hangs(
    systemd: Systemd, start: Start, connect: Connect, tmp_path: Path, workers: str
) -> None:
    (tmp_path / "hang.py").write_text(
        """
import time
from fumi_core import Fumi

app = Fumi(auth_optional=True, close_timeout=0.1)

@app.on_mail_from
async def hang(ctx, next):
    time.sleep(1000)
"""
    )
    port = free_port()
    flags = ("--listen", f"127.0.0.1:{port}", "--workers", workers)
    start(*flags, "hang:app", environment={**systemd.environment, "WATCHDOG_USEC": "100000"})
    client = connect(port)
    client.say("EHLO x")
    client.sock.sendall(b"MAIL FROM:<a@b.example>\r\n")
    while not systemd.silent(2):
        pass


# Reading new settings takes as long as there is a file "hold"; "reading" is there when it has begun.
SLOW = """
import time
from pathlib import Path
import fumi_core.program.work, fumi_core.runtime.master
from fumi_core import Fumi

app = Fumi(auth_optional=True, close_timeout=0.1)
read_again = fumi_core.program.work.read_again

def slowly(ctx):
    Path("reading").touch()
    while Path("hold").exists():
        time.sleep(0.01)
    return read_again(ctx)

fumi_core.program.work.read_again = slowly
"""


Slow = Callable[..., Program]


@pytest.fixture
def slow(systemd: Systemd, start: Start, tmp_path: Path) -> Slow:
    """Start two workers, and a reload that lasts until the file "hold" is gone."""

    def run(module: str = SLOW) -> Program:
        (tmp_path / "slow.py").write_text(module)
        flags = ("--listen", f"127.0.0.1:{free_port()}", "--proxy-protocol", "off", "--workers", "2", "slow:app")
        program = start(*flags, environment={**systemd.environment, "WATCHDOG_USEC": "100000"})
        while systemd.hear() != "READY=1":
            pass
        (tmp_path / "hold").touch()
        program.process.send_signal(signal.SIGHUP)
        until((tmp_path / "reading").exists)
        while not systemd.hear().startswith("RELOADING=1"):
            pass
        return program

    return run


def test_neither_the_watchdog_nor_a_stop_waits_for_new_settings(systemd: Systemd, slow: Slow) -> None:
    program = slow()
    program.process.send_signal(signal.SIGHUP)
    assert [systemd.hear() for _ in range(5)] == ["WATCHDOG=1"] * 5
    program.process.send_signal(signal.SIGTERM)
    while (heard := systemd.hear()) != "STOPPING=1":
        assert heard == "WATCHDOG=1"
    assert program.process.wait(60) == 0


def kill_workers(program: Program) -> None:
    for pid in children(program.process.pid):
        os.kill(pid, signal.SIGKILL)


def test_a_watchdog_without_a_serving_worker_starves(systemd: Systemd, slow: Slow) -> None:
    kill_workers(slow())
    while not systemd.silent(1):
        pass


def test_settings_that_cannot_be_read_in_time_are_given_up_and_workers_are_replaced(
    systemd: Systemd, slow: Slow, tmp_path: Path
) -> None:
    program = slow(SLOW + "fumi_core.runtime.master.READ_TIMEOUT = 0.3\n")
    until(lambda: "reload failed" in program.log.read_text())
    assert "ERROR fumi.core reload failed: the old settings stay in use" in program.log.read_text()
    while systemd.hear() != "READY=1":
        pass
    kill_workers(program)
    until(lambda: program.log.read_text().count("worker died") == 2)
    while systemd.hear() != "WATCHDOG=1":
        pass
    # As long as the first reload hangs there is no other beside it.
    program.process.send_signal(signal.SIGHUP)
    refused = "an earlier reload still waits for a file"
    until(lambda: refused in program.log.read_text())
    (tmp_path / "hold").unlink()
    sent = 1

    def reloaded() -> bool:
        nonlocal sent
        text = program.log.read_text()
        if text.count(refused) == sent:
            sent += 1
            program.process.send_signal(signal.SIGHUP)
        return "INFO fumi.core reloaded" in text

    until(reloaded)
    assert program.process.poll() is None


def test_a_watchdog_for_another_process_is_ignored(start: Start, tmp_path: Path) -> None:
    with contextlib.closing(Systemd(str(tmp_path / "notify"))) as systemd:
        flags = ("--listen", f"127.0.0.1:{free_port()}", "--deliver", "discard:")
        start(*flags, environment={**systemd.environment, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
        assert systemd.hear() == "READY=1"
        assert systemd.silent(0.1)


def test_a_single_notification_waits_until_systemd_has_read_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fumi_core.runtime.systemd, "NOTIFY_TIMEOUT", 60)
    with contextlib.closing(Systemd(str(tmp_path / "notify"))) as systemd:
        others = systemd.busy()
        monkeypatch.setenv("NOTIFY_SOCKET", systemd.environment["NOTIFY_SOCKET"])
        notifier = Notifier()
        notifier.alive()  # in vain, at once

        def tell() -> None:
            notifier.ready()
            notifier.reloading()
            notifier.stopping()

        telling = threading.Thread(target=tell)
        telling.start()
        assert [systemd.hear() for _ in range(others)] == ["other"] * others
        assert [systemd.hear().partition("\n")[0] for _ in range(3)] == ["READY=1", "RELOADING=1", "STOPPING=1"]
        telling.join()


def test_a_systemd_that_reads_nothing_is_not_waited_for_for_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fumi_core.runtime.systemd, "NOTIFY_TIMEOUT", 0.01)
    with contextlib.closing(Systemd(str(tmp_path / "notify"))) as systemd:
        systemd.busy()
        monkeypatch.setenv("NOTIFY_SOCKET", systemd.environment["NOTIFY_SOCKET"])
        Notifier().ready()
    assert "cannot notify systemd state=READY=1" in caplog.text


def test_children_see_nothing_of_it(start: Start, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(
        """
import os
from fumi_core import Fumi

app = Fumi(auth_optional=True)

@app.on_mail_from
async def tell(ctx, next):
    ctx.reject(",".join(name for name in os.environ if name.startswith(("NOTIFY", "WATCHDOG", "LISTEN"))) or "nothing")
"""
    )
    port = free_port()
    environment = {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "60000000", "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    program = start("--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off", "env:app", environment=environment)
    client = connect(port)
    client.say("EHLO x")
    assert b"nothing" in client.say("MAIL FROM:<a@b.example>")
    assert "cannot notify systemd" in program.log.read_text()
