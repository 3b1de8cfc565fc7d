"""What is negotiated (RFC 9325), asked with openssl's own client; and all that testssl.sh knows to ask."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import s_client
from tests.edge.program import Program, StartEdge
from tests.support.certificates import Authority

LEGACY = "DEFAULT@SECLEVEL=0"
"""Lets the client offer what OpenSSL itself would not any more."""


@pytest.fixture
def program(backend: StartBackend, edge: StartEdge) -> Program:
    return edge(backend=backend())


def cipher(printed: str) -> str | None:
    """The cipher agreed upon, None for none."""
    found = re.search(r"^New, \S+, Cipher is (\S+)$", printed, re.MULTILINE)
    return found[1] if found and found[1] != "(NONE)" else None


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_versions_before_1_2_are_refused(program: Program, version: str) -> None:
    printed = s_client(program.tls_port, version, "-cipher", LEGACY)
    assert cipher(printed) is None
    assert "alert protocol version" in printed


def test_min_tls_1_3_refuses_1_2_on_both_kinds_of_port(backend: StartBackend, edge: StartEdge) -> None:
    program = edge("--min-tls", "1.3", backend=backend())
    for port, starttls in ((program.tls_port, False), (program.starttls_port, True)):
        assert "alert protocol version" in s_client(port, "-tls1_2", starttls=starttls)
        assert (cipher(s_client(port, starttls=starttls)) or "").startswith("TLS_")


@pytest.mark.parametrize(
    "offered", ["AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES256-SHA384", "DHE-RSA-AES128-GCM-SHA256", "aNULL"]
)
def test_ciphers_without_forward_secrecy_or_authentication_of_data_are_refused(program: Program, offered: str) -> None:
    printed = s_client(program.tls_port, "-tls1_2", "-cipher", f"{offered}:@SECLEVEL=0")
    assert cipher(printed) is None
    assert "alert handshake failure" in printed


def test_the_servers_order_of_ciphers_counts(program: Program) -> None:
    both = ["ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"]
    for offered in (both, both[::-1]):
        printed = s_client(program.tls_port, "-tls1_2", "-cipher", ":".join(offered))
        assert cipher(printed) == "ECDHE-ECDSA-AES128-GCM-SHA256"


def test_ciphers_selects_those_of_tls_1_2(backend: StartBackend, edge: StartEdge) -> None:
    program = edge("--ciphers", "ECDHE-ECDSA-CHACHA20-POLY1305", backend=backend())
    assert cipher(s_client(program.tls_port, "-tls1_2")) == "ECDHE-ECDSA-CHACHA20-POLY1305"
    assert cipher(s_client(program.tls_port, "-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256")) is None
    assert (cipher(s_client(program.tls_port)) or "").startswith("TLS_")
    sessions = program.fetch("/metrics")[1]
    assert 'cipher="ECDHE-ECDSA-CHACHA20-POLY1305"' in sessions
    assert 'cipher="ECDHE-ECDSA-AES128-GCM-SHA256"' not in sessions


@pytest.mark.parametrize(
    ("group", "named"),
    [("X25519", "X25519"), ("P-256", "ECDH, prime256v1"), ("P-384", "ECDH, secp384r1"), ("P-521", "ECDH, secp521r1")],
)
def test_the_usual_groups_are_there(program: Program, group: str, named: str) -> None:
    printed = s_client(program.tls_port, "-groups", group)
    assert cipher(printed)
    assert re.search(f"^(Server|Peer) Temp Key: {named},", printed, re.MULTILINE)


def test_neither_renegotiation_nor_compression_is_offered(edge: StartEdge, backend: StartBackend) -> None:
    # Without a banner: a client that renegotiates takes one for a violation of the protocol.
    program = edge("--health-interval", "0", backend=backend(lambda peer: peer.line()))
    printed = s_client(program.tls_port, "-tls1_2", "-comp", "-cipher", LEGACY, say="R\n", letters=True)
    assert "Compression: NONE" in printed
    assert "Secure Renegotiation IS supported" in printed
    assert "RENEGOTIATING" in printed
    assert "no renegotiation" in printed


def test_early_data_is_not_offered(program: Program) -> None:
    assert "Max Early Data: 0" in s_client(program.tls_port)


def test_alpn_takes_the_servers_first_choice_and_ignores_strangers(backend: StartBackend, edge: StartEdge) -> None:
    program = edge("--alpn", "smtp, managesieve", backend=backend())
    assert "ALPN protocol: smtp\n" in s_client(program.tls_port, "-alpn", "managesieve,smtp")
    printed = s_client(program.tls_port, "-alpn", "h2")
    assert cipher(printed)
    assert "No ALPN negotiated" in printed


@pytest.mark.long
@pytest.mark.parametrize("starttls", [False, True])
def test_testssl_finds_nothing_worse_than_low(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path, starttls: bool
) -> None:
    """With certificates of both kinds, from an authority that it is told to trust."""
    assert shutil.which("testssl"), "this test needs testssl.sh: apt-get install testssl.sh"
    ecdsa, rsa = authority.issue("localhost", days=90), authority.issue("localhost", days=90, kind="rsa")
    program = edge(backend=backend(), certs=("--cert", ecdsa[0], "--key", ecdsa[1], "--cert", rsa[0], "--key", rsa[1]))
    report = tmp_path / "report.json"
    command = ["testssl", "--quiet", "--color", "0", "--warnings", "batch", "--ip", "127.0.0.1", "--nodns", "none"]
    command += ["--add-ca", str(authority.path), "--jsonfile", str(report), *(["--starttls", "smtp"] if starttls else [])]
    port = program.starttls_port if starttls else program.tls_port
    done = subprocess.run([*command, f"localhost:{port}"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    findings = json.loads(report.read_text())
    assert len(findings) > 50, done.stdout
    bad = {each["id"]: each["finding"] for each in findings if each["severity"] not in ("OK", "INFO", "LOW", "DEBUG")}
    # Those are about the openssl program that testssl.sh found, and about the authority, which publishes no revocations.
    strange = ("engine_problem", "cert_revocation")
    assert {name: finding for name, finding in bad.items() if not name.startswith(strange)} == {}
