"""fumi-core --workers: who does the work, and what becomes of it when a process dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import fumi_core
from tests.core.client import Client, Connect
from tests.core.programs import Program, Start
from tests.support.ports import free_port
from tests.support.programs import listening
from tests.support.waiting import until

# MAIL tells which worker it came to; "hang@" makes that worker hear nothing any more.
WHO = """
import os, time
from fumi_core import Fumi

app = Fumi(auth_optional=True)

@app.on_mail_from
async def who(ctx, next):
    if ctx.address.address.startswith("hang@"):
        time.sleep(1000)
    if ctx.address.address.startswith("who@"):
        ctx.reject(f"worker={os.getpid()}", 550)
"""


class Set:
    """A running fumi-core with workers."""

    def __init__(self, program: Program, port: int, connect: Connect) -> None:
        self.program = program
        self.port = port
        self._connect = connect

    def client(self) -> tuple[Client, int]:
        """A client that has said EHLO, and the pid of its worker."""
        client = self._connect(self.port)
        assert client.say("EHLO client.example").startswith(b"250")
        found = re.search(rb"worker=(\d+)", client.say("MAIL FROM:<who@b.example>"))
        assert found
        return client, int(found[1])

    def clients(self) -> dict[int, Client]:
        """A client of each of two workers."""
        found: dict[int, Client] = {}
        while len(found) < 2:
            client, pid = self.client()
            if found.setdefault(pid, client) is not client:
                client.close()
        return found

    @property
    def log(self) -> str:
        return str(self.program.log.read_text())


TwoWorkers = Callable[..., Set]


@pytest.fixture
def two_workers(start: Start, connect: Connect, tmp_path: Path) -> TwoWorkers:
    def run(*flags: str, module: str = WHO) -> Set:
        (tmp_path / "who.py").write_text(module)
        port = free_port()
        listen = ("--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off")
        return Set(start(*listen, "--workers", "2", *flags, "who:app"), port, connect)

    return run


def in_flight(client: Client) -> Client:
    """A client half-way through its message."""
    client.envelope()
    assert client.say("DATA").startswith(b"354")
    client.sock.sendall(b"half of it\r\n")
    return client


def gone(pid: int) -> bool:
    # The file may be there, and the process gone by the time that it is read.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_killed_worker_is_replaced_and_only_its_own_connections_suffer(two_workers: TwoWorkers, connect: Connect) -> None:
    workers = two_workers()
    (killed, victim), (other, bystander) = workers.clients().items()
    in_flight(bystander)
    os.kill(killed, signal.SIGKILL)
    assert victim.reply() == b""
    pids: set[int] = set()
    while not pids - {other}:
        client, pid = workers.client()  # never refused, never reset
        client.close()
        pids.add(pid)
    assert killed not in pids
    assert bystander.say(b"the rest\r\n.").startswith(b"250")
    assert [line for line in workers.log.splitlines() if "died" in line and f"pid={killed} reason=SIGKILL" in line]
    assert workers.log.count("died") == 1
    bystander.close()
    assert workers.program.stop() == 0


class Metrics:
    """The metrics of a running program."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with contextlib.closing(urllib.request.urlopen(self._base + path, timeout=30)) as answer:
            return str(answer.read().decode())

    def values(self) -> dict[str, float]:
        return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", self.get("/metrics"), re.MULTILINE)}

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.get("/readyz") == "ready\n"
        return False


def test_metrics_add_up_over_workers_and_survive_their_death(two_workers: TwoWorkers) -> None:
    port = free_port()
    metrics = Metrics(port)
    workers = two_workers("--metrics", f"127.0.0.1:{port}")
    until(metrics.ready)
    before = metrics.values()
    assert before['fumi_core_commands_total{command="VRFY"}'] == 0
    assert before["fumi_core_worker_restarts_total"] == 0
    assert before["fumi_core_message_bytes_count"] == 0
    assert before["fumi_core_connections_active"] == 0
    assert before['fumi_core_hook_seconds_count{phase="mail_from"}'] == 0
    clients = workers.clients()
    for client in clients.values():
        in_flight(client)
        assert client.say(b".").startswith(b"250")
    until(lambda: metrics.values()["fumi_core_message_bytes_sum"] == 24)
    until(lambda: metrics.values()['fumi_core_commands_total{command="DATA"}'] == 2)
    until(lambda: metrics.values()["fumi_core_connections_active"] == 2)
    before = metrics.values()
    assert before['fumi_core_messages_total{result="accepted"}'] == 2
    assert before['fumi_core_message_bytes_bucket{le="+Inf"}'] == 2
    mails = before['fumi_core_commands_total{command="MAIL"}']
    assert before['fumi_core_hook_seconds_count{phase="mail_from"}'] == mails >= 4
    assert before['fumi_core_hook_seconds_count{phase="data"}'] == 0
    assert before['fumi_core_build_info{version="' + fumi_core.__version__ + '"}'] == 1
    open_before = before["fumi_core_connections_active"]
    assert before["fumi_core_connections_total"] >= open_before

    os.kill(min(clients), signal.SIGKILL)
    # Gauges are lower while a worker is missing.
    lasting = [name for name in before if re.search(r"(_total|_count|_sum|_bucket|_info|_start_time_seconds)\b", name)]
    assert len(lasting) == len(before) - 5  # connections, descriptors and their limit, two kinds of memory
    while (now := metrics.values())["fumi_core_worker_restarts_total"] == 0:
        assert [name for name in lasting if now[name] < before[name]] == []
    until(lambda: metrics.values()["fumi_core_connections_active"] < open_before)
    workers.clients()
    until(lambda: metrics.values()["fumi_core_connections_total"] >= before["fumi_core_connections_total"] + 2)
    now = metrics.values()
    assert [name for name in lasting if now[name] < before[name]] == []
    assert now['fumi_core_messages_total{result="accepted"}'] == 2


def test_max_clients_counts_over_all_workers(two_workers: TwoWorkers, connect: Connect) -> None:
    workers = two_workers("--max-clients", "3")
    held = [connect(workers.port) for _ in range(3)]
    assert all(client.banner.startswith(b"220") for client in held)
    assert connect(workers.port).banner.startswith(b"421")


def test_sigterm_drains_all_workers(two_workers: TwoWorkers) -> None:
    port = free_port()
    metrics = Metrics(port)
    workers = two_workers("--metrics", f"127.0.0.1:{port}")
    clients = [in_flight(client) for client in workers.clients().values()]
    workers.program.process.send_signal(signal.SIGTERM)
    until(lambda: not listening(workers.port))
    until(lambda: not metrics.ready())
    for client in clients:
        assert client.say(b"the rest\r\n.").startswith(b"250")
        assert client.reply().startswith(b"421")
        client.close()
    assert workers.program.process.wait(60) == 0
    assert "died" not in workers.log


def test_sigterm_to_the_whole_group_is_one_stop_not_two(two_workers: TwoWorkers) -> None:
    workers = two_workers()
    clients = {pid: in_flight(client) for pid, client in workers.clients().items()}
    for pid in (*clients, workers.program.process.pid, *clients):
        os.kill(pid, signal.SIGTERM)
    until(lambda: not listening(workers.port))
    for client in clients.values():
        assert client.say(b".").startswith(b"250")
        client.close()
    assert workers.program.process.wait(60) == 0


def test_a_second_sigterm_ends_all_at_once(two_workers: TwoWorkers) -> None:
    workers = two_workers()
    clients = {pid: in_flight(client) for pid, client in workers.clients().items()}
    workers.program.process.send_signal(signal.SIGTERM)
    until(lambda: "stopping" in workers.log)
    workers.program.process.send_signal(signal.SIGTERM)
    assert workers.program.process.wait(60) == 128 + signal.SIGTERM
    assert all(gone(pid) for pid in clients)


def test_a_worker_that_overstays_is_killed(two_workers: TwoWorkers) -> None:
    workers = two_workers("--drain-timeout", "0.1")
    client, pid = workers.client()
    client.sock.sendall(b"MAIL FROM:<hang@b.example>\r\n")
    assert workers.program.stop() == 0
    assert f"pid={pid} reason=SIGKILL" in workers.log


def test_workers_end_with_a_master_that_is_killed(two_workers: TwoWorkers) -> None:
    port = free_port()
    workers = two_workers("--metrics", f"127.0.0.1:{port}")
    until(Metrics(port).ready)
    clients = workers.clients()
    (busy, client), (idle, other) = clients.items()
    in_flight(client)
    workers.program.process.kill()
    workers.program.process.wait()
    other.close()
    until(lambda: gone(idle))
    until(lambda: not listening(workers.port) and not listening(port))
    assert client.say(b".").startswith(b"250")
    client.close()
    until(lambda: gone(busy))


def test_workers_that_cannot_start_are_tried_at_longer_and_longer_intervals(two_workers: TwoWorkers) -> None:
    module = """
import os
from fumi_core import Fumi

class Broken(Fumi):
    async def listen(self, *arguments, **extra):
        os._exit(3)

app = Broken()
"""
    workers = two_workers(module=module)
    until(lambda: workers.log.count('reason="exit status 3"') >= 8)
    pauses = [float(pause) for pause in re.findall(r"worker=0 .*pause=(\S+)", workers.log)]
    assert pauses == sorted(set(pauses))
    assert len(pauses) >= 2
    assert workers.program.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigusr1_and_sigusr2_are_ignored(start: Start, connect: Connect, workers: str) -> None:
    port = free_port()
    listen = ("--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off", "--metrics", f"127.0.0.1:{free_port()}")
    program = start(*listen, "--deliver", "discard:", "--workers", workers)
    pid = program.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(lambda: len(children.read_text().split()) == (3 if workers == "2" else 0))
    before = children.read_text()
    for each in (pid, *map(int, before.split())):
        os.kill(each, signal.SIGUSR1)
        os.kill(each, signal.SIGUSR2)
    client = connect(port)
    assert client.banner.startswith(b"220")
    client.close()
    assert children.read_text() == before
    assert program.stop() == 0
    assert "died" not in program.log.read_text()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_between_listening_and_serving_is_a_clean_one(start: Start, tmp_path: Path, workers: str) -> None:
    (tmp_path / "early.py").write_text(
        """
import os, signal
from fumi_core import Fumi

starter = os.getpid()

class Early(Fumi):
    async def listen(self, *arguments, **extra):
        try:
            os.close(os.open("told", os.O_CREAT | os.O_EXCL))
            os.kill(starter, signal.SIGTERM)
        except FileExistsError:
            pass
        await super().listen(*arguments, **extra)

app = Early(auth_optional=True)
"""
    )
    flags = ("--listen", f"127.0.0.1:{free_port()}", "--workers", workers)
    program = start(*flags, "early:app", wait="stopping")
    assert program.process.wait(60) == 0
