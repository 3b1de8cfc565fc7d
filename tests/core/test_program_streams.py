"""fumi-core with a standard stream that is closed, or that no process reads."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.core.client import Connect
from tests.core.programs import PROGRAM, get
from tests.support.ports import free_port
from tests.support.proc import children
from tests.support.programs import listening
from tests.support.waiting import until


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"], ids=["stderr", "all"])
def test_no_socket_takes_the_place_of_a_stream_that_is_closed_from_the_start(
    connect: Connect, tmp_path: Path, workers: str, closed: str
) -> None:
    port, metrics = free_port(), free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{metrics}", "--workers", workers, "--deliver", "discard:"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {closed}', "bash", PROGRAM, *flags, "--proxy-protocol", "off"], cwd=tmp_path
    )
    try:
        until(lambda: process.poll() is not None or (listening(port) and listening(metrics)))
        assert process.poll() is None
        client = connect(port)
        assert client.banner.startswith(b"220")
        client.close()
        for pid in [process.pid, *children(process.pid)]:
            for fd in (0, 1, 2) if "0" in closed else (2,):
                assert os.readlink(f"/proc/{pid}/fd/{fd}") == os.devnull
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_mail_does_not_wait_for_the_reader_of_the_log(connect: Connect, tmp_path: Path, workers: str) -> None:
    port, metrics = free_port(), free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{metrics}", "--workers", workers, "--deliver", "discard:"]
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with open(ours, "rb") as log, open(theirs, "wb", buffering=0) as full:
        while full.write(b"x" * 4096):
            pass
        os.set_blocking(theirs, True)
        process = subprocess.Popen([PROGRAM, *flags, "--proxy-protocol", "off"], stderr=theirs, cwd=tmp_path)
        full.close()
        try:
            until(lambda: listening(port) and listening(metrics))
            for _ in range(5):
                client = connect(port)
                client.envelope()
                client.say("DATA")
                assert client.say("hi\r\n.").startswith(b"250")
                client.say("QUIT")
                client.close()
            assert get(f"http://127.0.0.1:{metrics}/readyz") == (200, "ready\n")
            process.terminate()
            # What waited has its moment, in which somebody reads again.
            text = log.read().decode().lstrip("x")
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    assert text.count("messages=1 ") == 5
    assert text.count("stopping signal=SIGTERM") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_does_not_wait_for_the_reader_of_the_log(connect: Connect, tmp_path: Path, workers: str) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    theirs.send(b"x")
            theirs.setblocking(True)
            flags = ("--listen", f"127.0.0.1:{port}", "--workers", workers, "--deliver", "discard:", "--proxy-protocol", "off")
            process = subprocess.Popen([PROGRAM, *flags], stderr=theirs.fileno(), cwd=tmp_path)
        stack.callback(process.wait)
        stack.callback(process.kill)
        until(lambda: listening(port))
        client = connect(port)
        assert client.banner.startswith(b"220")
        client.close()
        process.terminate()
        assert process.wait(60) == 0
