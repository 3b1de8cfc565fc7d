"""The files for TLS backends are read again on SIGHUP and when they change, as those for clients are."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.edge.renewal import put
from tests.edge.test_tls_backends import ALTERNATIVE, context, session
from tests.support.certificates import Authority, CertificateFiles, MakeAuthority
from tests.support.waiting import until

INTERVALS = ("0.05", "0")
"""By the clock, and on SIGHUP only."""


@pytest.fixture(scope="module")
def new_authority(make_authority: MakeAuthority) -> Authority:
    return make_authority("New CA")


@pytest.fixture
def ca(tmp_path: Path, authority: Authority) -> Path:
    """A file with the CA, to be replaced."""
    return Path(shutil.copy(authority.path, tmp_path / "ca.pem"))


def replace(path: Path, data: bytes) -> None:
    path.with_suffix(".new").write_bytes(data)
    os.replace(path.with_suffix(".new"), path)


def reload(program: Program, interval: str) -> None:
    if interval == "0":
        program.process.send_signal(signal.SIGHUP)


def reloads(program: Program, result: str) -> float:
    return program.metric("fumi_edge_certificate_reloads_total", result=result)


def refusals(program: Program, count: int) -> None:
    """Wait for so many reloads that changed nothing."""
    until(lambda: len(program.events("reload failed: the old settings stay in use")) == count, "the refusal")


def refused(program: Program, clients: Clients) -> bool:
    """Whether a client gets 421."""
    client = clients.tls(program.tls_port)
    banner = client.line()
    client.close()
    return banner.startswith(b"421 4.3.2")


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_new_ca_is_used_at_once_and_no_session_survives(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    authority: Authority,
    new_authority: Authority,
    ca: Path,
    interval: str,
) -> None:
    server = backend(tls=context(authority.issue("localhost", alternative=ALTERNATIVE)))
    program = edge("--backend-ca", str(ca), "--cert-reload-interval", interval, backend=server)
    session(program, clients)
    session(program, clients)
    until(lambda: server.resumed == 1, "a session that is resumed")
    replace(ca, new_authority.path.read_bytes())
    reload(program, interval)
    until(lambda: program.events("certificates for backends loaded"), "the reload")
    assert refused(program, clients)
    assert server.resumed == 1
    replace(ca, authority.path.read_bytes())
    reload(program, interval)
    until(lambda: len(program.events("certificates for backends loaded")) == 2, "the reload")
    session(program, clients)
    assert server.resumed == 1


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_wrong_file_changes_nothing_is_logged_and_counted(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, ca: Path, interval: str
) -> None:
    server = backend(tls=context(authority.issue("localhost", alternative=ALTERNATIVE)))
    program = edge("--backend-ca", str(ca), "--cert-reload-interval", interval, backend=server)
    session(program, clients)
    replace(ca, b"nothing\n")
    reload(program, interval)
    until(lambda: reloads(program, "failed") >= 1, "the failure")
    until(lambda: program.events("certificate not loaded"), "the line about it")
    assert program.events("certificate not loaded")[0]["error"] == f"{ca}: holds no PEM certificate"
    if interval == "0":
        until(lambda: program.events("reloaded in part"), "the line about the reload")
    session(program, clients)
    until(lambda: server.resumed == 1, "a session that is resumed")


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_renewed_certificate_of_ours_is_shown_at_once(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    authority: Authority,
    files: CertificateFiles,
    interval: str,
) -> None:
    server = backend(tls=context(authority.issue("localhost", alternative=ALTERNATIVE), authority))
    put(authority.issue("old.example"), *files)
    flags = ("--backend-ca", str(authority.path), "--backend-cert", str(files[0]), "--backend-key", str(files[1]))
    program = edge(*flags, "--cert-reload-interval", interval, backend=server)
    session(program, clients)
    put(authority.issue("new.example"), *files)
    reload(program, interval)
    until(lambda: program.events("certificates for backends loaded"), "the reload")
    session(program, clients)
    assert ["old.example" in each for each in server.shown] == [True, False]
    assert "new.example" in server.shown[1]
    assert server.resumed == 0
    assert program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="new.example") > 0
    put(authority.issue("expired.example", days=-1), *files)
    reload(program, interval)
    until(lambda: reloads(program, "failed") >= 1, "the failure")
    session(program, clients)
    assert "new.example" in server.shown[2]


def test_settings_for_tls_backends_change_on_sighup(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, tmp_path: Path
) -> None:
    names: list[str | None] = []
    made = context(authority.issue("core.example", "other.example"))
    made.sni_callback = lambda sock, name, context: names.append(name)
    server = backend(tls=made)
    path = tmp_path / "edge.toml"
    path.write_text(f'[edge]\nbackend-ca = "{authority.path}"\nbackend-name = "core.example"\n')
    program = edge("--config", str(path), backend=server)
    session(program, clients)
    for number, text in enumerate(
        (
            'backend-name = ""',
            'backend-name = "*.example"',
            'backend-name = "core.example"\nbackend-key = "x"',
            'backend-ca = "nowhere"',
        ),
        1,
    ):
        path.write_text(f'[edge]\nbackend-ca = "{authority.path}"\n{text}\n' if "ca" not in text else f"[edge]\n{text}\n")
        program.process.send_signal(signal.SIGHUP)
        refusals(program, number)
        session(program, clients)
    path.write_text(f'[edge]\nbackend-ca = "{authority.path}"\nbackend-name = "other.example"\n')
    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.events("reloaded"), "the reload")
    session(program, clients)
    assert names == ["core.example"] * 5 + ["other.example"]


def test_workers_have_them_too(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    authority: Authority,
    new_authority: Authority,
    ca: Path,
) -> None:
    """A worker that replaces another has what the master has read."""
    server = backend(tls=context(new_authority.issue("localhost", alternative=ALTERNATIVE)))
    program = edge("--workers", "2", "--backend-ca", str(ca), "--cert-reload-interval", "0", backend=server)
    assert refused(program, clients)
    replace(ca, new_authority.path.read_bytes())
    program.process.send_signal(signal.SIGHUP)
    until(lambda: len(program.events("certificates for backends loaded")) == 2, "the reload in both")
    session(program, clients)
    workers = program.workers()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    until(lambda: len(program.workers() - workers) == 2, "new workers")
    session(program, clients)
