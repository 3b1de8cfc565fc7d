"""OpenSSL's own server as a backend over TLS: sessions that it resumes, and its key updates."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until


class Server:
    """``openssl s_server``: its input goes to its client, and with TLS 1.3 a line ``K`` is a command."""

    def __init__(self, port: int, certificate: CertificateFiles, log: Path, version: str) -> None:
        self._log = log
        self.updates_keys = version == "-tls1_3"
        with log.open("wb") as output:
            files = ("-cert", certificate[0], "-key", certificate[1])
            self._process = subprocess.Popen(
                ["stdbuf", "-oL", "openssl", "s_server", "-accept", f"127.0.0.1:{port}", *files, version],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def shows(self, text: str, count: int) -> None:
        """Wait until it has shown this so many times."""
        until(lambda: self.log.count(text) == count, text)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(params=["-tls1_2", "-tls1_3"])
def server(request: pytest.FixtureRequest, programs: Programs, certificate: CertificateFiles) -> Iterator[tuple[Server, int]]:
    """The server, and the port of an edge in front of it."""
    back, port = free_port(), free_port()
    made = Server(back, certificate, programs.directory / "s_server.log", request.param)
    files = ("--cert", certificate[0], "--key", certificate[1], "--backend-ca", certificate[0])
    places = ("--backend", f"tls:127.0.0.1:{back}", "--listen", f"127.0.0.1:{port}")
    flags = (*files, *places, "--proxy-protocol", "off", "--health-interval", "0")
    programs.start(BIN / "fumi-edge", *flags, port=port, log="edge.log")
    until(lambda: "ACCEPT" in made.log, "the server")
    yield made, port
    made.close()


def client(port: int, certificate: CertificateFiles) -> subprocess.Popen[str]:
    command = ["openssl", "s_client", "-quiet", "-connect", f"127.0.0.1:{port}", "-CAfile", str(certificate[0])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_s_server_resumes_the_session_and_its_key_updates_lose_nothing(
    server: tuple[Server, int], certificate: CertificateFiles
) -> None:
    backend, port = server
    updates = 0
    for number in (1, 2):
        with client(port, certificate) as peer:
            assert peer.stdin
            assert peer.stdout
            backend.shows("CIPHER is", number)
            for line in ("220 hi", "250 there", "250 and there"):
                backend.say(line)
                assert peer.stdout.readline().strip() == line
                if backend.updates_keys:
                    updates += 1
                    backend.say("K")
                    # It would take the next line for a part of this one.
                    backend.shows("SSL_do_handshake -> 1", updates)
            peer.stdin.write("from the client\n")
            peer.stdin.flush()
            backend.shows("from the client", number)
            peer.kill()
    assert backend.log.count("Reused session-id") == 1
