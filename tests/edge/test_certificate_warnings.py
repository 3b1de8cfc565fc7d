"""What the log at startup and --check report of certificates: served, expired, or unusable by any client."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fumi_core.version import VERSION
from tests.edge.backends import StartBackend
from tests.edge.clients import s_client
from tests.edge.program import StartEdge
from tests.support.certificates import Authority, MakeAuthority
from tests.support.starter import finished
from tests.support.waiting import until


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_start_is_logged_with_version_pid_and_certificates(
    backend: StartBackend, edge: StartEdge, authority: Authority, workers: str
) -> None:
    (cert, key), more = authority.issue("localhost"), authority.issue("other.test", days=9)
    certs = ("--cert", cert, "--key", key, "--cert", more[0], "--key", more[1])
    program = edge("--workers", workers, backend=backend(), certs=certs)
    (start,) = until(lambda: program.events("starting"), "the line")
    assert (start["version"], start["pid"], start["workers"]) == (VERSION, program.process.pid, int(workers))
    lines = program.events("serving certificate")
    assert [(line["name"], line["file"]) for line in lines] == [("localhost", str(cert)), ("other.test", str(more[0]))]
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", line["expires"]) for line in lines)


def test_an_expired_certificate_is_served_with_a_warning_and_fails_the_check(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue("localhost", days=-1)
    server = backend()
    program = edge("--cert-reload-interval", "0.02", backend=server, certs=("--cert", cert, "--key", key))
    (warning,) = until(lambda: program.events("certificate is not valid"), "the warning")
    assert warning["error"].startswith(f"{cert}: the certificate expired on 20")
    assert re.search("^subject=CN ?= ?localhost$", s_client(program.tls_port), re.MULTILINE)
    assert program.fetch("/readyz")[0] == 503
    flags = ("--cert", cert, "--key", key, "--backend", server.address, "--check")
    done = finished("fumi-edge", *flags)
    assert (done.returncode, done.stderr) == (2, f"Error: {warning['error']}\n")
    assert len(program.events("certificate is not valid")) == 1


def test_an_expired_ca_certificate_is_warned_of_and_fails_the_check(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path
) -> None:
    (cert, key), (expired, _) = authority.issue("localhost"), authority.issue("Old CA", days=-1, is_ca=True)
    chain, server = tmp_path / "chain.pem", backend()
    chain.write_text(cert.read_text() + expired.read_text())
    flags = ("--cert", chain, "--key", key, "--client-ca", expired)
    program = edge(backend=server, certs=flags)
    warnings = until(lambda: program.events("CA certificate is not valid"), "the warnings")
    assert [entry["level"] for entry in warnings] == ["warning", "warning"]
    done = finished("fumi-edge", *flags, "--backend", server.address, "--check")
    assert done.returncode == 2
    for path, warning in zip((chain, expired), warnings, strict=True):
        assert f"{path}: the CA certificate 'Old CA' expired on 20" in warning["error"]
        assert warning["error"] in done.stderr
    assert program.fetch("/readyz")[0] == 200  # the certificate itself is valid
    assert finished("fumi-edge", "--cert", cert, "--key", key, "--backend", server.address, "--check").returncode == 0


def test_certificates_that_no_cipher_works_with_are_reported_at_startup(
    backend: StartBackend, edge: StartEdge, make_authority: MakeAuthority, tmp_path: Path
) -> None:
    authority = make_authority("An authority")
    both = tmp_path / "localhost.pem"
    both.write_text("".join(path.read_text() for path in authority.issue("localhost")))
    shutil.copy(authority.path, tmp_path)
    server = backend()
    ciphers = ("--ciphers", "ECDHE-RSA-AES128-GCM-SHA256")
    program = edge(*ciphers, backend=server, certs=("--cert", tmp_path))
    (mismatch,) = until(lambda: program.events("no cipher for the certificates"), "the warning")
    (skipped,) = program.events("certificate skipped")
    assert (skipped["level"], mismatch["level"]) == ("info", "warning")
    assert skipped["error"].startswith(f"{tmp_path}/ca.pem: holds no private key")
    done = finished("fumi-edge", "--cert", tmp_path, "--backend", server.address, *ciphers, "--check")
    assert (done.returncode, done.stderr) == (2, f"Error: {mismatch['error']}\n")
