"""``--deliver smtp:ADDR`` and ``lmtp:ADDR`` as an operator meets them: errors, readiness, metrics, logs."""

from __future__ import annotations

import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fumi_core.client import dependency
from fumi_core.delivery import parse_target
from tests.core.client import Connect
from tests.core.programs import PROGRAM
from tests.core.scripted_hop import Answer, StartHop
from tests.support.ports import free_port
from tests.support.starter import finished
from tests.support.waiting import until


@pytest.mark.parametrize(
    "target",
    [
        "smtp:",
        "lmtp:",
        "smtp:nonsense",
        "smtp::25",
        "smtp:127.0.0.1:0",
        "smtp:::1:25",
        "lmtp:unix:",
        "lmtp:fd:3",
        "smtp:127.0.0.1:99999",
    ],
)
def test_a_next_hop_that_cannot_be_is_one_line_and_exit_2(target: str, tmp_path: Path) -> None:
    done = finished("fumi-core", "--deliver", target, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("Error: --deliver: ")


@pytest.mark.parametrize("target", ["smtp:127.0.0.1:9", "lmtp:127.0.0.1:9", "lmtp:unix:/nowhere"])
def test_check_says_that_the_next_hop_is_not_there(target: str, tmp_path: Path) -> None:
    done = check(target, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"Error: --deliver {target}: ")


def test_check_says_what_a_next_hop_greets_with_and_wants_220(scripted_hop: StartHop, tmp_path: Path) -> None:
    done = check(f"smtp:{scripted_hop().address}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "configuration OK\n", "")
    done = check(f"smtp:{scripted_hop(BANNER=b'554 5.3.2 no' + bytes([13, 10])).address}", tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(": unexpected banner: 554 5.3.2 no\n")


def check(target: str, directory: Path) -> subprocess.CompletedProcess[str]:
    flags = ["--check", "--listen", "127.0.0.1:0", "--domain", "example.org", "--deliver", target]
    return finished("fumi-core", *flags, cwd=directory)


@pytest.mark.parametrize(
    ("banner", "problem"),
    [
        (b"220 hop\r\n", None),
        ([b"220-hop\r\n", b"220 hop\r\n"], None),
        (b"554 5.3.2 no\r\n", "unexpected banner: 554 5.3.2 no"),
        (b"hello\r\n", "malformed reply line b'hello\\r'"),
        (b"", "no banner in time"),
        (None, "connection closed without a banner"),
    ],
)
@pytest.mark.parametrize("unix", [False, True])
def test_a_next_hop_is_ready_when_it_greets(
    scripted_hop: StartHop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, banner: Answer, problem: str | None, unix: bool
) -> None:
    if banner == b"":
        monkeypatch.setattr(dependency, "TIMEOUT", 0.2)
    hop = scripted_hop(str(tmp_path / "hop") if unix else None, BANNER=banner)
    assert parse_target(f"smtp:{hop.address}").dependency_problem() == (problem and f"smtp:{hop.address}: {problem}")


def test_a_next_hop_that_is_not_there_is_not_ready(tmp_path: Path) -> None:
    path = tmp_path / "hop"
    assert parse_target(f"lmtp:unix:{path}").dependency_problem() == f"lmtp:unix:{path}: No such file or directory"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert parse_target(f"smtp:127.0.0.1:{port}").dependency_problem() == f"smtp:127.0.0.1:{port}: Connection refused"


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_readiness_metrics_and_log_tell_of_the_next_hop(scripted_hop: StartHop, connect: Connect, tmp_path: Path) -> None:
    answers = iter([b"250 Ok\r\n", b"452 4.2.2 full\r\n", b"550 5.7.1 spam\r\n", None])
    hop = scripted_hop(dot=lambda line: next(answers))
    log = tmp_path / "log"
    flags = ["--proxy-protocol", "off", "--listen", f"unix:{tmp_path / 's'}", "--metrics", f"127.0.0.1:{free_port()}"]
    with log.open("w") as output:
        program = subprocess.Popen([PROGRAM, *flags, "--deliver", f"smtp:{hop.address}"], stderr=output, cwd=tmp_path)
    try:
        base = f"http://{flags[-1]}"
        until(lambda: reachable(flags[-1]))
        assert get(f"{base}/readyz") == (200, "ready\n")
        replies = [deliver(tmp_path / "s")[:3] for _ in range(4)]
        assert replies == [b"250", b"452", b"550", b"451"]
        hop.close()
        assert deliver(tmp_path / "s").startswith(b"451 4.4.1 ")
        metrics = get(f"{base}/metrics")[1]
        for line in ('result="ok",target="smtp"} 1', 'result="deferred",target="smtp"} 3', 'result="failed",target="smtp"} 1'):
            assert f"fumi_core_deliveries_total{{{line}.0\n" in metrics
        assert 'fumi_core_deliveries_total{result="ok",target="lmtp"} 0.0\n' in metrics
        assert get(f"{base}/readyz") == (503, f"smtp:{hop.address}: Connection refused\n")
    finally:
        program.terminate()
        assert program.wait(40) == 0
    problems = [line for line in log.read_text().splitlines() if "next hop failed" in line]
    assert len(problems) == 2
    assert f"next_hop=smtp:{hop.address}" in problems[0]
    assert "Traceback" not in log.read_text()


def deliver(path: Path) -> bytes:
    """One transaction over a Unix socket: the first refusal, or the last reply."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as replies:
        sock.settimeout(30)
        sock.connect(str(path))
        for line in ("", "HELO x\r\n", "MAIL FROM:<>\r\n", "RCPT TO:<c@d.example>\r\n", "DATA\r\n", "hi\r\n.\r\n"):
            sock.sendall(line.encode())
            reply = replies.readline()
            if not reply.startswith((b"2", b"3")):
                break
        return reply


def reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0
