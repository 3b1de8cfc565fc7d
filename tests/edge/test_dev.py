"""--dev: one command that serves mail with a certificate of its own, and leaves no files."""

from __future__ import annotations

import signal
import smtplib
import socket
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from fumi_edge.edge import Edge
from fumi_edge.program.dev import DevCore
from tests.edge.clients import Clients
from tests.edge.program import Program, run
from tests.support.waiting import until

PORTS = ("--listen", "127.0.0.1:0", "--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")


def test_dev_mode_leaves_no_key_after_a_second_signal(clients: Clients, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = Program("--dev", *PORTS, "--drain-timeout", "600", cwd=tmp_path)
    try:
        assert clients.plain(program.starttls_port).line().startswith(b"220")
        assert list(tmp_path.glob("fumi-dev-*"))
        program.process.send_signal(signal.SIGTERM)
        until(lambda: program.events("draining"), "the drain")
        program.stop()
        assert list(tmp_path.glob("fumi-dev-*/key.pem")) == []
        assert not [line for line in program.noise if "Traceback" in line]
    finally:
        program.kill()


def test_dev_mode_can_be_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run("--dev", *PORTS, "--check") == (0, [])
    assert list(tmp_path.glob("fumi-dev-*")) == []


@pytest.mark.parametrize(("listens", "shown"), [("::1", "[::1]"), ("::", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("", "127.0.0.1")])
def test_the_addresses_of_the_pages_are_where_they_are(listens: str, shown: str) -> None:
    family = socket.AF_INET6 if ":" in listens else socket.AF_INET
    with socket.create_server((listens, 0), family=family) as sock:
        edge = cast(Edge, SimpleNamespace(listeners=[], metrics_sockets=[sock]))
        assert f"http://{shown}:{sock.getsockname()[1]}/mail\n" in DevCore(edge, "").instructions()


def test_an_error_of_openssl_is_one_line_with_its_last_line(tmp_path: Path) -> None:
    program = tmp_path / "openssl"
    program.write_text("#!/bin/sh\necho first >&2; echo no entropy >&2; exit 1\n")
    program.chmod(0o755)
    environment = {"PATH": str(tmp_path)}
    assert run("--dev", *PORTS, environment=environment) == (2, ["Error: openssl could not make a certificate: no entropy"])


def test_dev_mode_takes_a_message_over_both_ports(tmp_path: Path) -> None:
    ports = ("--listen", "127.0.0.1:0", "--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    program = Program("--dev", *ports, cwd=tmp_path)
    try:
        context = ssl._create_unverified_context()
        with smtplib.SMTP_SSL("127.0.0.1", program.tls_port, context=context) as client:
            client.sendmail("a@example.org", ["b@example.org"], "Subject: one\n\nhello\n")
        with smtplib.SMTP("127.0.0.1", program.starttls_port) as client:
            client.starttls(context=context)
            client.sendmail("a@example.org", ["b@example.org"], "Subject: two\n\nhello\n")
        assert len(list((tmp_path / "maildir" / "new").iterdir())) == 2
        assert program.stop() == 0
        printed = program.stdout.read()
        for name in ("swaks", "curl", "openssl s_client", "smtplib", str(program.tls_port)):
            assert name in printed
    finally:
        program.kill()


def test_dev_mode_ends_at_the_first_ctrl_c_although_a_client_stays(clients: Clients, tmp_path: Path) -> None:
    program = Program("--dev", *PORTS, cwd=tmp_path)
    try:
        client = clients.plain(program.starttls_port)
        assert client.line().startswith(b"220")
        assert client.ask(b"EHLO me\r\n")
        assert client.ask(b"MAIL FROM:<a@example.org>\r\n") == [b"250 2.1.0 Ok\r\n"]
        assert program.stop(signal.SIGINT) == 0
        assert not program.events("draining")
    finally:
        program.kill()
