"""fumi-edge as a service of systemd: which socket is for which clients, and who hears that it is ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.support.certificates import CertificateFiles

PROGRAM = Path(sys.executable).with_name("fumi-edge")
# As systemd does it: sockets from descriptor 3 on, with their names. Out of the way first: one of them may be 3 itself.
ACTIVATE = """
exec 200<&$1 201<&$2; exec 3<&200 4<&201 200<&- 201<&-; shift 2
LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=smtp:smtps exec "$@"
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sockets_are_identified_by_their_names_and_outlive_the_edge(
    workers: str, backend: StartBackend, certificate: CertificateFiles, clients: Clients, tmp_path: Path
) -> None:
    flags = ["--cert", certificate[0], "--key", certificate[1], "--backend", backend().address, "--workers", workers]
    flags += ["--listen", "fd:smtps", "--starttls-listen", "fd:smtp"]
    with (
        socket.create_server(("127.0.0.1", 0)) as smtp,
        socket.create_server(("127.0.0.1", 0)) as smtps,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
        (tmp_path / "log").open("wb") as log,
    ):
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        numbers = [smtp.fileno(), smtps.fileno()]
        command = ["bash", "-c", ACTIVATE, "bash", *map(str, [*numbers, PROGRAM, *flags])]
        for _ in range(2):
            early = clients.plain(smtp.getsockname()[1])  # it waits for the edge to come
            environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
            process = subprocess.Popen(command, pass_fds=numbers, env=environment, stderr=log)
            try:
                assert systemd.recv(100) == b"READY=1"
                assert early.line().startswith(b"220")
                assert clients.tls(smtps.getsockname()[1]).line().startswith(b"220")
                early.close()
                process.send_signal(signal.SIGHUP)
                assert systemd.recv(100).startswith(b"RELOADING=1\n")
                assert systemd.recv(100) == b"READY=1"
                clients.close()
                process.terminate()
                assert systemd.recv(100) == b"STOPPING=1"
                assert process.wait(60) == 0
            finally:
                process.kill()
                process.wait()
