"""Renewal: certificates are swapped under the real program, good ones and bad ones, and nobody notices but new clients."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients, s_client
from tests.edge.metrics import reloads
from tests.edge.program import Program, StartEdge
from tests.edge.renewal import put
from tests.support.certificates import Authority, CertificateFiles, serial, shown_serial
from tests.support.waiting import until


def test_sighup_puts_new_certificates_into_service_and_drops_no_connection(
    backend: StartBackend,
    edge: StartEdge,
    authority: Authority,
    clients: Clients,
    files: CertificateFiles,
    shown: Callable[..., str],
) -> None:
    old, new = authority.issue("localhost"), authority.issue("localhost", "more.test", kind="rsa", days=9)
    put(old, *files)
    program = edge("--cert-reload-interval", "0", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    for result in ("ok", "deferred", "failed"):
        assert reloads(program, result) == 0
    before = program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost")
    context = ssl.create_default_context(cafile=authority.path)
    client, halfway = clients.tls(program.tls_port, context=context), clients.plain(program.starttls_port)
    client.line()
    halfway.line()
    put(new, *files)
    assert shown(program) == serial(old[0])  # nobody has said anything
    program.process.send_signal(signal.SIGHUP)
    until(lambda: reloads(program, "ok") == 1, "the reload")
    assert shown(program) == shown(program, "more.test") == serial(new[0])
    assert program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost") > before + 86400
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert halfway.ask(b"STARTTLS\r\n")[0].startswith(b"220")
    assert clients.upgrade(halfway, context=context).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    (loaded,) = until(lambda: program.events("certificate loaded"), "the line")
    assert (loaded["name"], loaded["file"]) == ("localhost", str(files[0]))


def test_a_change_is_noticed_without_a_signal(
    backend: StartBackend, edge: StartEdge, authority: Authority, files: CertificateFiles, shown: Callable[..., str]
) -> None:
    old, new = authority.issue("localhost"), authority.issue("localhost")
    put(old, *files)
    # So long may certificate and key be apart before it is a failure.
    program = edge("--cert-reload-interval", "0.5", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    assert shown(program) == serial(old[0])
    put(new, *files)
    until(lambda: shown(program) == serial(new[0]), "the new certificate")
    assert reloads(program, "failed") == 0


def test_certbots_links_are_followed(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path, shown: Callable[..., str]
) -> None:
    """A renewal writes new files into archive/ and puts new links into live/; a further name is a further directory."""

    def renew(name: str, number: int, certificate: CertificateFiles) -> None:
        live, archive = tmp_path / "live" / name, tmp_path / "archive" / name
        for directory in (live, archive):
            directory.mkdir(parents=True, exist_ok=True)
        for each, source in zip(("cert", "fullchain", "privkey"), (certificate[0], *certificate), strict=True):
            shutil.copy(source, archive / f"{each}{number}.pem")
            (live / "new").symlink_to(f"../../archive/{name}/{each}{number}.pem")
            (live / "new").rename(live / f"{each}.pem")

    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "README").write_text("This directory contains your keys and certificates.\n")
    old, new, other = authority.issue("localhost"), authority.issue("localhost"), authority.issue("other.test")
    renew("localhost", 1, old)
    program = edge("--cert-reload-interval", "0.05", backend=backend(), certs=("--cert", tmp_path))
    assert shown(program) == serial(old[0])
    renew("localhost", 2, new)
    until(lambda: shown(program) == serial(new[0]), "the new certificate")
    renew("other.test", 1, other)
    until(lambda: len(program.events("certificate loaded")) == 2, "another certificate")
    assert shown(program, "other.test") == serial(other[0])
    assert shown(program) == serial(new[0])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_certificate_that_expires_at_run_time_gives_way_to_a_valid_one(
    backend: StartBackend, edge: StartEdge, authority: Authority, shown: Callable[..., str], workers: str
) -> None:
    short, long = authority.issue("localhost", days=4 / 86400), authority.issue("localhost", kind="rsa", days=3)
    certs = ("--cert", short[0], "--key", short[1], "--cert", long[0], "--key", long[1])
    program = edge("--cert-reload-interval", "0", "--workers", workers, backend=backend(), certs=certs)

    def served() -> set[str] | None:
        try:
            return {shown(program) for _ in range(4)}
        except ssl.SSLCertVerificationError:
            return None  # it has expired in this very moment

    until(lambda: served() == {serial(long[0])}, "the other certificate")
    until(lambda: program.fetch("/readyz") == (200, "ready\n"), "readiness")

    def expiry() -> float:
        return program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost")

    until(lambda: expiry() > time.time() + 86400, "the expiry of the one that is served")


def test_readiness_ends_when_the_last_certificate_expires(backend: StartBackend, edge: StartEdge, authority: Authority) -> None:
    cert, key = authority.issue("localhost", days=4 / 86400)
    program = edge("--cert-reload-interval", "0", backend=backend(), certs=("--cert", cert, "--key", key))
    until(lambda: program.fetch("/readyz")[0] == 503, "the expiry")
    (warning,) = until(lambda: program.events("certificate is not valid"), "the warning")
    assert f"{cert}: the certificate expired on 20" in warning["error"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_while_certificates_load_at_the_start_is_a_reload(
    backend: StartBackend,
    edge: StartEdge,
    authority: Authority,
    files: CertificateFiles,
    tmp_path: Path,
    workers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(authority.issue("localhost"), *files)
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, sys

def told(event, arguments, told=[]):
    if event == "open" and arguments[0] == {str(files[0])!r} and not told:
        told.append(1)
        os.kill(os.getpid(), signal.SIGHUP)

sys.addaudithook(told)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with open(os.devnull) as nothing:  # so that the program starts in an interpreter of its own
        certs = ("--cert", files[0], "--key", files[1])
        program = edge("--workers", workers, backend=backend(), certs=certs, inherited=(nothing.fileno(),))
    until(lambda: program.events("reloaded"), "the reload")
    assert program.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_log_says_reloaded_only_when_everything_was(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path, workers: str
) -> None:
    paths = [tmp_path / "a.pem", tmp_path / "b.pem"]
    for path in paths:
        path.write_text("".join(each.read_text() for each in authority.issue(f"{path.stem}.test")))
    flags = ("--cert-reload-interval", "0", "--workers", workers)
    program = edge(*flags, backend=backend(), certs=("--cert", paths[0], "--cert", paths[1]))
    good = paths[1].read_text()
    paths[1].write_text(good[:300])
    program.process.send_signal(signal.SIGHUP)
    (line,) = until(lambda: program.events("reloaded in part"), "the reload")
    assert (line["level"], line["error"]) == ("error", f"{paths[1]}: holds no PEM certificate")
    until(lambda: reloads(program, "failed") == int(workers), "the count")
    assert program.events("reloaded") == []
    paths[1].write_text(good)
    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.events("reloaded"), "the reload")


def test_a_directory_gains_and_loses_certificates_but_never_the_default(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path, shown: Callable[..., str]
) -> None:
    a, b, c = (authority.issue(f"{name}.test") for name in "abc")

    def put_into_directory(name: str, certificate: CertificateFiles) -> None:
        (tmp_path / f"{name}.tmp").write_text("".join(path.read_text() for path in certificate))
        (tmp_path / f"{name}.tmp").rename(tmp_path / f"{name}.pem")

    def published() -> set[str]:
        return {
            line.partition('name="')[2].partition('"')[0]
            for line in program.fetch("/metrics")[1].splitlines()
            if line.startswith("fumi_edge_certificate_not_after_timestamp_seconds{")
        }

    put_into_directory("a", a)
    put_into_directory("b", b)
    program = edge("--cert-reload-interval", "0.05", backend=backend(), certs=("--cert", tmp_path))
    assert published() == {"a.test", "b.test"}
    put_into_directory("c", c)
    until(lambda: published() == {"a.test", "b.test", "c.test"}, "the third")
    assert shown(program, "c.test") == serial(c[0])
    (tmp_path / "b.pem").unlink()
    until(lambda: published() == {"a.test", "c.test"}, "the end of the second")
    assert [entry["name"] for entry in until(lambda: program.events("certificate removed"), "the line")] == ["b.test"]
    (tmp_path / "a.pem").unlink()
    until(lambda: reloads(program, "failed") == 1, "the complaint")
    assert shown(program, "a.test") == serial(a[0])
    (tmp_path / "c.pem").unlink()
    until(lambda: reloads(program, "failed") == 2, "the complaint")
    assert (shown(program, "a.test"), shown(program, "c.test")) == (serial(a[0]), serial(c[0]))
    assert published() == {"a.test", "c.test"}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_across_a_reload_that_changes_the_kind_of_key(
    backend: StartBackend,
    edge: StartEdge,
    authority: Authority,
    clients: Clients,
    files: CertificateFiles,
    version: ssl.TLSVersion,
) -> None:
    old, new = authority.issue("localhost", kind="rsa"), authority.issue("localhost")
    put(old, *files)
    program = edge("--cert-reload-interval", "0", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    context = ssl.create_default_context(cafile=authority.path)
    context.minimum_version = context.maximum_version = version
    client = clients.tls(program.tls_port, context=context)
    client.line()
    put(new, *files)
    program.process.send_signal(signal.SIGHUP)
    until(lambda: reloads(program, "ok") == 1, "the reload")
    raw = clients.plain(program.tls_port)
    with context.wrap_socket(raw.sock, server_hostname="localhost", session=client.tls.session) as resumed:
        assert resumed.session_reused
        assert resumed.recv(3) == b"220"
    # The old kind is gone, and not only for clients that prefer the new one.
    refused = s_client(program.tls_port, "-sigalgs", "RSA-PSS+SHA256", "-servername", "localhost")
    assert "alert handshake failure" in refused


def swap_under_load(
    program: Program,
    authority: Authority,
    files: CertificateFiles,
    pairs: Sequence[CertificateFiles],
    seconds: float,
    every: float,
    pause: float,
) -> tuple[list[str], set[str], float]:
    """Handshakes without end by two clients while the files are swapped.

    Returns what failed, the serial numbers seen, and the most seconds for which certificate and key were apart.
    """
    seen, failures, stop, longest = set(), [], threading.Event(), 0.0
    context = ssl.create_default_context(cafile=authority.path)

    def knock() -> None:
        while not stop.wait(pause):
            try:
                raw = socket.create_connection(("127.0.0.1", program.tls_port), 30)
                with context.wrap_socket(raw, server_hostname="localhost") as client:
                    seen.add(shown_serial(client))
                    assert client.recv(3) == b"220"
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=knock) for _ in range(2)]
    for thread in threads:
        thread.start()
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        longest = max(longest, put(pairs[number % 2], *files))
        if number % 3 == 0:
            program.process.send_signal(signal.SIGHUP)
        time.sleep(every)
    stop.set()
    for thread in threads:
        thread.join()
    return failures, seen, longest


def test_no_handshake_fails_while_certificates_are_swapped(
    backend: StartBackend, edge: StartEdge, authority: Authority, files: CertificateFiles
) -> None:
    """Also of two kinds of key, which must never mix."""
    pairs = [authority.issue("localhost"), authority.issue("localhost", kind="rsa")]
    put(pairs[0], *files)
    program = edge("--cert-reload-interval", "0.05", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    failures, seen, longest = swap_under_load(program, authority, files, pairs, seconds=10, every=0.2, pause=0)
    assert failures == []
    assert seen == {serial(cert) for cert, _ in pairs}
    # Files that were apart for longer than they have to settle are rightly complained of.
    assert (program.events("certificate not loaded"), reloads(program, "failed")) == ([], 0) or longest >= 0.05


@pytest.mark.long
def test_no_handshake_fails_in_a_minute_of_swaps(
    backend: StartBackend, edge: StartEdge, authority: Authority, files: CertificateFiles
) -> None:
    pairs = [authority.issue("localhost"), authority.issue("localhost")]
    put(pairs[0], *files)
    program = edge("--cert-reload-interval", "0.5", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    failures, seen, _ = swap_under_load(program, authority, files, pairs, seconds=60, every=1, pause=0.04)
    assert failures == []
    assert seen == {serial(cert) for cert, _ in pairs}
