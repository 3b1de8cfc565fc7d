"""A peer that is alive and does not read for longer than the user timeout keeps its connection."""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.programs import Programs, Setup
from tests.support.starter import BIN
from tests.support.waiting import until

SECONDS = 75.0
"""More than twice the user timeout."""
LINE = b"x" * 98 + b"\r\n"
LINES = 200_000
"""Of a message that fits into no socket's buffers."""
APP = """
import asyncio, pathlib
from fumi_core import Fumi
app = Fumi(auth_optional=True, size=None)

@app.on_data
async def read_late(ctx, next):
    pathlib.Path("begun").touch()
    while not pathlib.Path("go").exists():
        await asyncio.sleep(0.1)
    size = 0
    async for piece in ctx.stream:
        size += len(piece)
    pathlib.Path("size").write_text(str(size))
"""


def wait_without_reading() -> None:
    end = time.monotonic() + SECONDS
    until(lambda: time.monotonic() > end, patience=2 * SECONDS)


def send(smtp: smtplib.SMTP, results: list[tuple[int, bytes]]) -> threading.Thread:
    """Send a long message in a thread; its reply is appended to ``results``."""

    def deliver() -> None:
        smtp.ehlo()
        smtp.mail("a@b.example")
        smtp.rcpt("c@d.example")
        results.append(smtp.data(LINE * LINES))

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    return thread


@pytest.mark.long
def test_a_handler_that_reads_its_message_late_gets_all_of_it_through_the_edge(
    programs: Programs, certificate: tuple[Path, Path]
) -> None:
    (programs.directory / "late.py").write_text(APP)
    core_port, port = free_port(), free_port()
    of_core = ["--listen", f"127.0.0.1:{core_port}", "--proxy-protocol", "required", "late:app"]
    programs.start(BIN / "fumi-core", *of_core, port=core_port, log="core.log")
    flags = ["--cert", str(certificate[0]), "--key", str(certificate[1]), "--backend", f"127.0.0.1:{core_port}"]
    programs.start(BIN / "fumi-edge", *flags, "--listen", f"127.0.0.1:{port}", port=port, log="edge.log")
    context = ssl.create_default_context(cafile=str(certificate[0]))
    replies: list[tuple[int, bytes]] = []
    with smtplib.SMTP_SSL("localhost", port, context=context) as smtp:
        sending = send(smtp, replies)
        until((programs.directory / "begun").exists)
        wait_without_reading()
        (programs.directory / "go").touch()
        sending.join(60)
    assert [code for code, _ in replies] == [250], (programs.directory / "edge.log").read_text()
    assert int((programs.directory / "size").read_text()) == len(LINE) * LINES


@pytest.mark.long
def test_a_next_hop_that_reads_a_message_late_gets_all_of_it(programs: Programs) -> None:
    begun, go = threading.Event(), threading.Event()
    sizes: list[int] = []

    def serve(listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=converse, args=(client,), daemon=True).start()

    def converse(client: socket.socket) -> None:
        with client, client.makefile("rwb") as stream:

            def say(line: bytes) -> None:
                stream.write(line + b"\r\n")
                stream.flush()

            say(b"220 late")
            for line in stream:
                if line != b"DATA\r\n":
                    say(b"250 ok")
                    continue
                say(b"354 go on")
                begun.set()
                go.wait(2 * SECONDS)
                size = 0
                while (content := stream.readline()) not in (b".\r\n", b""):
                    size += len(content)
                sizes.append(size)
                say(b"250 queued")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        port = free_port()
        flags = ["--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off"]
        hop = f"smtp:127.0.0.1:{listener.getsockname()[1]}"
        programs.start(BIN / "fumi-core", *flags, "--deliver", hop, port=port, log="core.log")
        replies: list[tuple[int, bytes]] = []
        with smtplib.SMTP("127.0.0.1", port) as smtp:
            sending = send(smtp, replies)
            assert begun.wait(60)
            wait_without_reading()
            go.set()
            sending.join(60)
    assert [code for code, _ in replies] == [250], (programs.directory / "core.log").read_text()
    assert sizes[0] >= len(LINE) * LINES


@pytest.mark.long
def test_a_client_that_reads_its_replies_late_gets_all_of_them(
    two_processes: Callable[..., Setup], certificate: tuple[Path, Path]
) -> None:
    """Neither the edge's connection to it ends, nor the core's to the edge, which stops reading too."""
    setup = two_processes()
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with (
        socket.create_connection(("127.0.0.1", setup.tls_port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as sock,
    ):
        sock.settimeout(60)
        sent = 0
        with contextlib.suppress(TimeoutError, ssl.SSLWantWriteError):
            sock.settimeout(5)
            while True:
                sent += sock.send(b"NOOP\r\n" * 1000)
        wait_without_reading()
        sock.settimeout(60)
        commands = sent // len(b"NOOP\r\n")
        received = b""
        while received.count(b"\r\n") < commands + 1:
            data = sock.recv(1 << 20)
            assert data, received.count(b"\r\n")
            received += data
