"""Servers as the kernel sees them: started, ready, stopped, what CPU they took and what memory they hold. Linux only."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

READY_WITHIN = 20.0
STOP_WITHIN = 10.0
LOG_TAIL = 600


class ServerFailed(Exception):
    """A server could not be started, or ended by itself; a note on it holds the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running contestant: the port to talk to, and the processes whose CPU and memory count as its own."""

    port: int
    pids: tuple[int, ...]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def running(argv: Sequence[str], port: int, log: Path, env: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run a server for the length of the block, from its first accepted connection on; gives its pid. Output goes to `log`."""
    try:
        with log.open("wb") as output:
            environment = {**os.environ, **(env or {})}
            process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
    except OSError as error:
        raise ServerFailed(f"{argv[0]}: {error.strerror}") from error
    try:
        wait_until_accepting(process, port)
        yield process.pid
        if process.poll() is not None:
            raise ServerFailed("ended by itself")
    except Exception as error:
        ended = "" if process.poll() is None else f" ended with status {process.returncode} and"
        error.add_note(f"{log.stem}{ended} said: {tail(log)}")
        raise
    finally:
        stop(process)


def wait_until_accepting(process: subprocess.Popen[bytes], port: int) -> None:
    """Poll the port until it takes a connection; ServerFailed when the process ends first or takes over READY_WITHIN seconds."""
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed("ended at its start")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise ServerFailed(f"nothing listens on port {port} after {READY_WITHIN} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for one that does not heed it within STOP_WITHIN seconds."""
    process.terminate()
    try:
        process.wait(STOP_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: Path) -> str:
    """The end of a log, on one line."""
    return " | ".join(log.read_text(errors="replace")[-LOG_TAIL:].split("\n")).strip(" |") or "(it said nothing)"


def cpu_ns(pids: Sequence[int]) -> int:
    """CPU nanoseconds, user and system, that these processes and all their descendants have taken so far.

    /proc/PID/task/*/schedstat is as fine, but forgets the threads that have ended, and stunnel starts one a connection;
    /proc/PID/stat remembers them, in ticks of 10 ms. The process's CPU clock does both.
    """
    total = 0
    for pid in with_descendants(pids):
        total += time.clock_gettime_ns(cpu_clock(pid)) + ended_children_ns(pid)
    return total


def cpu_clock(pid: int) -> int:
    """The clock id of a process's CPU time, as clock_getcpuclockid(3) makes it (CPUCLOCK_SCHED)."""
    return (~pid << 3) | 2


def ended_children_ns(pid: int) -> int:
    """CPU nanoseconds of the children that a process has waited for (cutime and cstime of /proc/PID/stat), to one tick."""
    cutime, cstime = stat_fields(pid)[13:15]
    return (int(cutime) + int(cstime)) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def with_descendants(pids: Sequence[int]) -> list[int]:
    """These pids and those of all their living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # A process may end between being listed and being read: then it is nobody's child any more.
            with contextlib.suppress(OSError):
                children.setdefault(int(stat_fields(int(entry.name))[1]), []).append(int(entry.name))
    found, queue = [], list(pids)
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += children.get(pid, [])
    return found


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat behind the program's name (which may hold spaces): state, ppid, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def memory_kib(pids: Sequence[int]) -> int:
    """Proportional set size of these processes and their descendants, in KiB: pages that several share are counted once."""
    return sum(smaps_kib(pid, "Pss") for pid in with_descendants(pids))


def resident_kib(pids: Sequence[int]) -> int:
    """Resident set size of these processes and their descendants, in KiB: nobody else's coming and going changes it."""
    return sum(smaps_kib(pid, "Rss") for pid in with_descendants(pids))


def smaps_kib(pid: int, field: str) -> int:
    """A field of /proc/PID/smaps_rollup, in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ServerFailed(f"process {pid} has no {field}")
