"""Root becomes --user: for good, in every worker and thread, after the files that only root can read."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.proc import children
from tests.support.waiting import until


@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_root_becomes_the_user_for_good(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    tmp_path: Path,
    certificate: CertificateFiles,
    workers: tuple[str, ...],
) -> None:
    program = edge("--user", "nobody", *workers, backend=backend())
    assert clients.tls(program.tls_port).line().startswith(b"220")
    pid = program.process.pid
    pids = [pid, *children(pid)]
    assert len(pids) == (4 if workers else 1)
    for each in pids:
        status = Path(f"/proc/{each}/status").read_text()
        ids = [line.split()[1:] for line in status.splitlines() if line.startswith(("Uid:", "Gid:"))]
        nobody = pwd.getpwnam("nobody")
        assert ids == [[str(nobody.pw_uid)] * 4, [str(nobody.pw_gid)] * 4]


@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_keys_that_the_user_cannot_read_are_reported_at_startup(
    backend: StartBackend, edge: StartEdge, public: CertificateFiles, workers: tuple[str, ...]
) -> None:
    server, (open_to_all, secret) = backend(), public
    program = edge("--user", "nobody", *workers, backend=server, certs=("--cert", open_to_all, "--key", secret))
    (line,) = until(lambda: program.events("renewals need a restart"), "the warning")
    assert (line["level"], line["user"], line["unreadable"]) == ("warning", "nobody", str(secret))
    secret.chmod(0o644)
    program = edge("--user", "nobody", backend=server, certs=("--cert", open_to_all, "--key", secret))
    assert program.fetch("/healthz")[0] == 200
    assert program.events(line["event"]) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_threads_need_nothing_that_the_user_may_not_read(
    backend: StartBackend, edge: StartEdge, clients: Clients, certificate: CertificateFiles
) -> None:
    """A name is resolved and files are looked at in threads, and asyncio imports what it needs for those when it has to."""
    server = backend()
    port = server.address.rpartition(":")[2]
    program = edge("--user", "nobody", "--cert-reload-interval", "0", backend=f"localhost:{port}")
    assert "concurrent.futures.thread" in subprocess.check_output(
        [sys.executable, "-c", "import fumi_edge.program.work, sys; print(*sys.modules)"], text=True
    )
    assert clients.tls(program.tls_port).line().startswith(b"220")
    program.process.send_signal(signal.SIGHUP)
    (line,) = until(lambda: program.events("reloaded in part"), "the reload")
    assert "Permission denied" in line["error"]
