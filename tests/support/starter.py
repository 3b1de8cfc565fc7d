"""Starts fumi-core and fumi-edge without the half second that a new interpreter needs for what they import.

``failing-core`` is fumi-core with system calls that fail (tests/faults/seeded).

One process has imported them, and forks for each start; from there on it is the program, with arguments, environment,
directory and descriptors of its own. The commands of READMEs, systemd's and containers' execute the real files, and so does what
is to inherit descriptors.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

PROGRAMS = ("fumi-core", "fumi-edge", "failing-core")
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
_OURS = {str(BIN / program) for program in PROGRAMS}
_STATUS = struct.Struct("i")


def start(
    *command: str | Path,
    stdin: IO[bytes] | None = None,
    stdout: int | IO[Any],
    stderr: int | IO[Any],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    inherited: Sequence[int] = (),
) -> Process:
    """Start a program, in a session of its own. What is to inherit descriptors, or is not ours, is the real file."""
    words = [str(word) for word in command]
    if words[0] in PROGRAMS:
        words[0] = str(BIN / words[0])
    with open(os.devnull, "rb") as nothing:
        if inherited or words[0] not in _OURS:
            return subprocess.Popen(
                words, stdin=stdin or nothing, stdout=stdout, stderr=stderr, cwd=cwd, env=env,
                pass_fds=inherited, start_new_session=True,
            )  # fmt: skip
        streams = (stdin or nothing, stdout, stderr)
        return Forked(words, [each if isinstance(each, int) else each.fileno() for each in streams], cwd, env)


def finished(
    *command: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    given: str | bytes = b"",
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a program that ends by itself, within ``timeout`` seconds. Raises TimeoutExpired."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(given.encode() if isinstance(given, str) else given)
        stdin.seek(0)
        process = start(*command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        for stream in (stdout, stderr):
            stream.seek(0)
        return subprocess.CompletedProcess(command, status, stdout.read().decode(), stderr.read().decode())


class Process(Protocol):
    """What tests need of subprocess.Popen."""

    args: Any
    pid: int
    returncode: int | Any

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """A process that the starter has forked."""

    def __init__(self, words: Sequence[str], streams: Sequence[int], cwd: Path | None, env: Mapping[str, str] | None) -> None:
        self.returncode: int | None = None
        self.args = words
        self._report, theirs = socket.socketpair()
        request = {"words": words, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        with theirs:
            socket.send_fds(_starter(), [json.dumps(request).encode()], [*streams, theirs.fileno()])
        self.pid: int = _STATUS.unpack(self._report.recv(_STATUS.size))[0]

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        if (status := self._look(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = _STATUS.unpack(self._report.recv(_STATUS.size))[0]
            self._report.close()
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            # As of Popen's: it may have ended since.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _starter() -> socket.socket:
    """The way to the process that forks; it ends when nobody has this end any more."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with theirs:
        command = [sys.executable, "-m", "tests.support.starter"]
        subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd=ROOT)
    return ours


# In that process


def _serve(control: socket.socket) -> None:
    import fumi_core.cli
    import fumi_edge.cli
    from tests.faults.seeded import launcher

    programs: dict[str, Callable[..., Any]] = {
        "fumi-core": fumi_core.cli.main,
        "fumi-edge": fumi_edge.cli.main,
        "failing-core": launcher.main,
    }
    # With a handler, for otherwise nothing is written to the descriptor.
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    deaths, bell = socket.socketpair()
    for sock in (deaths, bell):
        sock.setblocking(False)
    signal.set_wakeup_fd(bell.fileno())
    reports: dict[int, socket.socket] = {}
    while True:
        ready = select.select([control, deaths], [], [])[0]
        if deaths in ready:
            deaths.recv(4096)
            for pid in list(reports):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    _tell(reports.pop(pid), os.waitstatus_to_exitcode(status))
        if control in ready:
            text, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
            if not text:
                return
            request = json.loads(text)
            pid = os.fork()
            if not pid:
                name = Path(request["words"][0]).name
                _become(functools.partial(programs[name], prog_name=name), request, descriptors)
            report = socket.socket(fileno=descriptors.pop())
            for descriptor in descriptors:
                os.close(descriptor)
            report.send(_STATUS.pack(pid))
            reports[pid] = report


def _tell(report: socket.socket, status: int) -> None:
    with report, contextlib.suppress(OSError):  # nobody wants to know any more
        report.send(_STATUS.pack(status))


def _become(program: Callable[..., Any], request: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
        os.closerange(3, 1024)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = request["words"]
        program()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # As at the end of every interpreter: threads are waited for, then what is registered is called.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=0))
