"""The work that is measured, as the measuring process sees it: run a generator to its end, and insist that it got every answer.

Small messages to the core are sent by Postfix's `smtp-source`: a real client, written in C, so light that ten of its sessions
keep any of the servers busy. Large messages and TLS are sent by `client.py`: smtp-source writes 4 KiB at a time, which makes it
the slower end of a 5 MB message, and it knows no TLS.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from .contestants import FUMI
from .environment import postfix_environment, postfix_program

# A generator gives up by itself on a silent server; this is for one that does not.
WITHIN = 180.0

Load = Callable[[int, int], None]
"""Do so many units of work on the server at this port; LoadFailed unless every one was answered as it should be."""


class LoadFailed(Exception):
    """A generator did not get what it asked for; the message is what it said of it."""


def run(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Run a generator; LoadFailed when it fails or has anything to complain of."""
    try:
        environment = {**os.environ, **env}
        done = subprocess.run(argv, env=environment, stderr=subprocess.PIPE, text=True, timeout=WITHIN, check=False)
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"the load was not done after {WITHIN} s") from error
    if done.returncode or done.stderr:
        raise LoadFailed(last_line(done.stderr) or f"{argv[0]}: exit status {done.returncode}")


def last_line(text: str) -> str:
    """The last line of an output, where a traceback names its error."""
    return text.strip().rpartition("\n")[2]


def smtp_source(sessions: int, kept: bool, size: int = 1024) -> Load:
    """Messages of `size` bytes (and a short header) by `smtp-source`, which awaits and checks each reply.

    `kept`: each session sends all its messages over one connection; otherwise one message a connection.
    """

    def load(port: int, messages: int) -> None:
        kind = ["-d"] if kept else []
        envelope = ["-M", "localhost", "-f", "a@example.com", "-t", "b@example.net"]
        counts = ["-s", str(sessions), "-l", str(size), "-m", str(messages)]
        run([*postfix_program("smtp-source"), *kind, *counts, *envelope, f"127.0.0.1:{port}"], postfix_environment())

    return load


def client(load: str, *arguments: str) -> Load:
    """One of the loads of `client.py`, with its arguments."""

    def work(port: int, count: int) -> None:
        run([*client_program(load, port), "--count", str(count), *arguments], FUMI)

    return work


def client_program(load: str, port: int) -> list[str]:
    """The command that starts one of the loads of `client.py`."""
    return [sys.executable, "-m", "tests.bench.client", load, str(port)]


@contextlib.contextmanager
def idle_connections(port: int) -> Iterator[Callable[[str], None]]:
    """The load `idle` of `client.py` for the length of the block; gives what says a line to it and waits until that is done."""
    argv, environment, pipe = client_program("idle", port), {**os.environ, **FUMI}, subprocess.PIPE
    with subprocess.Popen(argv, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdin
        assert process.stdout
        commands, answers = process.stdin, process.stdout

        def say(line: str) -> None:
            # To one that has ended nothing can be said; why it ended is read all the same.
            with contextlib.suppress(BrokenPipeError):
                print(line, file=commands, flush=True)
            if (answer := answers.readline()) != "done\n":
                raise LoadFailed(last_line(answer + answers.read()))

        try:
            yield say
        finally:
            with contextlib.suppress(BrokenPipeError):
                commands.close()
