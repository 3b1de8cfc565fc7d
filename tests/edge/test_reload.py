"""Renewal: certificates are swapped under the real program, good ones and bad ones, and nobody notices but new clients."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

import fumi_core.runtime.files as files_module
import fumi_edge.tls.certificates as certificates_module
from fumi_core.version import VERSION
from fumi_edge.certificate_reload import Reloader
from fumi_edge.metrics import EdgeMetrics
from fumi_edge.tls.certificates import Certificates
from tests.starter import finished


def put(certificate, cert, key):
    """Replace two files as a careful program does: each at once, one right after the other. Returns the seconds in between."""
    for source, target in zip(certificate, (cert, key), strict=True):
        shutil.copy(source, f"{target}.new")
    begun = time.monotonic()
    for target in (cert, key):
        os.replace(f"{target}.new", target)
    return time.monotonic() - begun


def serial(cert):
    return subprocess.check_output(["openssl", "x509", "-serial", "-noout", "-in", cert], text=True).strip().partition("=")[2]


@pytest.fixture
def shown(authority, clients):
    """The serial number of the certificate that a port shows now."""
    context = ssl.create_default_context(cafile=authority.path)

    def ask(program, name="localhost"):
        client = clients.tls(program.tls_port, name, context)
        number = client.sock.getpeercert()["serialNumber"]
        assert client.line().startswith(b"220")
        client.close()
        return number

    return ask


@pytest.fixture
def files(tmp_path):
    return tmp_path / "cert.pem", tmp_path / "key.pem"


def reloads(program, result):
    return program.metric("fumi_edge_certificate_reloads_total", result=result)


def test_sighup_puts_new_certificates_into_service_and_drops_no_connection(backend, edge, authority, clients, files, shown, kit):
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
    kit.until(lambda: reloads(program, "ok") == 1, "the reload")
    assert shown(program) == shown(program, "more.test") == serial(new[0])
    assert program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost") > before + 86400
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert halfway.ask(b"STARTTLS\r\n")[0].startswith(b"220")
    assert clients.upgrade(halfway, context=context).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    (loaded,) = kit.until(lambda: program.events("certificate loaded"), "the line")
    assert (loaded["name"], loaded["file"]) == ("localhost", str(files[0]))


def test_a_change_is_noticed_without_a_signal(backend, edge, authority, files, shown, kit):
    old, new = authority.issue("localhost"), authority.issue("localhost")
    put(old, *files)
    # So long may certificate and key be apart before it is a failure.
    program = edge("--cert-reload-interval", "0.5", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    assert shown(program) == serial(old[0])
    put(new, *files)
    kit.until(lambda: shown(program) == serial(new[0]), "the new certificate")
    assert reloads(program, "failed") == 0


def test_certbots_links_are_followed(backend, edge, authority, tmp_path, shown, kit):
    """A renewal writes new files into archive/ and puts new links into live/; a further name is a further directory."""

    def renew(name, number, certificate):
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
    kit.until(lambda: shown(program) == serial(new[0]), "the new certificate")
    renew("other.test", 1, other)
    kit.until(lambda: len(program.events("certificate loaded")) == 2, "another certificate")
    assert shown(program, "other.test") == serial(other[0])
    assert shown(program) == serial(new[0])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_certificate_that_expires_at_run_time_gives_way_to_a_valid_one(backend, edge, authority, shown, kit, workers):
    short, long = authority.issue("localhost", days=4 / 86400), authority.issue("localhost", kind="rsa", days=3)
    certs = ("--cert", short[0], "--key", short[1], "--cert", long[0], "--key", long[1])
    program = edge("--cert-reload-interval", "0", "--workers", workers, backend=backend(), certs=certs)

    def served():
        try:
            return {shown(program) for _ in range(4)}
        except ssl.SSLCertVerificationError:
            return None  # it has expired in this very moment

    kit.until(lambda: served() == {serial(long[0])}, "the other certificate")
    kit.until(lambda: program.fetch("/readyz") == (200, "ready\n"), "readiness")

    def expiry():
        return program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost")

    kit.until(lambda: expiry() > time.time() + 86400, "the expiry of the one that is served")


def test_readiness_ends_when_the_last_certificate_expires(backend, edge, authority, kit):
    cert, key = authority.issue("localhost", days=4 / 86400)
    program = edge("--cert-reload-interval", "0", backend=backend(), certs=("--cert", cert, "--key", key))
    kit.until(lambda: program.fetch("/readyz")[0] == 503, "the expiry")
    (warning,) = kit.until(lambda: program.events("certificate is not valid"), "the warning")
    assert f"{cert}: the certificate expired on 20" in warning["error"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_while_certificates_load_at_the_start_is_a_reload(
    backend, edge, authority, files, tmp_path, kit, workers, monkeypatch
):
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
    kit.until(lambda: program.events("reloaded"), "the reload")
    assert program.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_log_says_reloaded_only_when_everything_was(backend, edge, authority, tmp_path, kit, workers):
    paths = [tmp_path / "a.pem", tmp_path / "b.pem"]
    for path in paths:
        path.write_text("".join(each.read_text() for each in authority.issue(f"{path.stem}.test")))
    flags = ("--cert-reload-interval", "0", "--workers", workers)
    program = edge(*flags, backend=backend(), certs=("--cert", paths[0], "--cert", paths[1]))
    good = paths[1].read_text()
    paths[1].write_text(good[:300])
    program.process.send_signal(signal.SIGHUP)
    (line,) = kit.until(lambda: program.events("reloaded in part"), "the reload")
    assert (line["level"], line["error"]) == ("error", f"{paths[1]}: holds no PEM certificate")
    kit.until(lambda: reloads(program, "failed") == int(workers), "the count")
    assert program.events("reloaded") == []
    paths[1].write_text(good)
    program.process.send_signal(signal.SIGHUP)
    kit.until(lambda: program.events("reloaded"), "the reload")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_start_is_logged_with_version_pid_and_certificates(backend, edge, authority, kit, workers):
    (cert, key), more = authority.issue("localhost"), authority.issue("other.test", days=9)
    certs = ("--cert", cert, "--key", key, "--cert", more[0], "--key", more[1])
    program = edge("--workers", workers, backend=backend(), certs=certs)
    (start,) = kit.until(lambda: program.events("starting"), "the line")
    assert (start["version"], start["pid"], start["workers"]) == (VERSION, program.process.pid, int(workers))
    lines = program.events("serving certificate")
    assert [(line["name"], line["file"]) for line in lines] == [("localhost", str(cert)), ("other.test", str(more[0]))]
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", line["expires"]) for line in lines)


def test_a_directory_gains_and_loses_certificates_but_never_the_default(backend, edge, authority, tmp_path, shown, kit):
    a, b, c = (authority.issue(f"{name}.test") for name in "abc")

    def put_into_directory(name, certificate):
        (tmp_path / f"{name}.tmp").write_text("".join(path.read_text() for path in certificate))
        (tmp_path / f"{name}.tmp").rename(tmp_path / f"{name}.pem")

    def published():
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
    kit.until(lambda: published() == {"a.test", "b.test", "c.test"}, "the third")
    assert shown(program, "c.test") == serial(c[0])
    (tmp_path / "b.pem").unlink()
    kit.until(lambda: published() == {"a.test", "c.test"}, "the end of the second")
    assert [entry["name"] for entry in kit.until(lambda: program.events("certificate dropped"), "the line")] == ["b.test"]
    (tmp_path / "a.pem").unlink()
    kit.until(lambda: reloads(program, "failed") == 1, "the complaint")
    assert shown(program, "a.test") == serial(a[0])
    (tmp_path / "c.pem").unlink()
    kit.until(lambda: reloads(program, "failed") == 2, "the complaint")
    assert (shown(program, "a.test"), shown(program, "c.test")) == (serial(a[0]), serial(c[0]))
    assert published() == {"a.test", "c.test"}


@pytest.mark.parametrize("case", ["half", "key missing", "other key", "gone", "expired"])
def test_a_bad_file_leaves_the_old_certificate_in_service(backend, edge, authority, files, shown, kit, case):
    """It is counted and reported once, not at every look, and again when somebody asks; what comes next is taken."""
    old, new, expired = authority.issue("localhost"), authority.issue("localhost"), authority.issue("localhost", days=-1)
    put(old, *files)
    program = edge("--cert-reload-interval", "0.1", backend=backend(), certs=("--cert", files[0], "--key", files[1]))

    def spoil():
        if case == "half":
            files[0].write_text(new[0].read_text()[:200])
        elif case == "key missing":
            files[1].unlink()
        elif case == "other key":
            shutil.copy(new[1], files[1])
        elif case == "expired":
            put(expired, *files)
        else:
            files[0].unlink()

    def reports():
        return len(program.events("certificate not loaded"))

    spoil()
    kit.until(reports, "the complaint")
    time.sleep(0.3)  # and there have been looks
    assert (reports(), reloads(program, "failed")) == (1, 1)
    assert reloads(program, "deferred") >= 1
    assert shown(program) == serial(old[0])
    program.process.send_signal(signal.SIGHUP)
    kit.until(lambda: reports() == 2, "the answer to the signal")
    assert reloads(program, "failed") == 2
    assert shown(program) == serial(old[0])
    put(new, *files)
    kit.until(lambda: shown(program) == serial(new[0]), "the good certificate")
    assert reports() == 2


def test_one_bad_file_does_not_hold_up_the_others(backend, edge, authority, tmp_path, shown, kit):
    first, second, new = authority.issue("first.test"), authority.issue("second.test"), authority.issue("second.test")
    pairs = [(tmp_path / f"{number}.pem", tmp_path / f"{number}.key") for number in (1, 2)]
    put(first, *pairs[0])
    put(second, *pairs[1])
    certs = ("--cert", pairs[0][0], "--key", pairs[0][1], "--cert", pairs[1][0], "--key", pairs[1][1])
    program = edge("--cert-reload-interval", "0", backend=backend(), certs=certs)
    pairs[0][0].write_text("nonsense")
    put(new, *pairs[1])
    program.process.send_signal(signal.SIGHUP)
    kit.until(lambda: reloads(program, "failed") == 1, "the complaint")
    assert shown(program, "first.test") == serial(first[0])
    assert shown(program, "second.test") == serial(new[0])


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_across_a_reload_that_changes_the_kind_of_key(
    backend, edge, authority, clients, files, kit, version
):
    old, new = authority.issue("localhost", kind="rsa"), authority.issue("localhost")
    put(old, *files)
    program = edge("--cert-reload-interval", "0", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    context = ssl.create_default_context(cafile=authority.path)
    context.minimum_version = context.maximum_version = version
    client = clients.tls(program.tls_port, context=context)
    client.line()
    put(new, *files)
    program.process.send_signal(signal.SIGHUP)
    kit.until(lambda: reloads(program, "ok") == 1, "the reload")
    raw = clients.plain(program.tls_port)
    with context.wrap_socket(raw.sock, server_hostname="localhost", session=client.sock.session) as resumed:
        assert resumed.session_reused
        assert resumed.recv(3) == b"220"
    # The old kind is gone, and not only for clients that prefer the new one.
    refused = kit.s_client(program.tls_port, "-sigalgs", "RSA-PSS+SHA256", "-servername", "localhost")
    assert "alert handshake failure" in refused


def test_an_expired_certificate_is_served_with_a_warning_and_fails_the_check(backend, edge, authority, kit, tmp_path):
    cert, key = authority.issue("localhost", days=-1)
    server = backend()
    program = edge("--cert-reload-interval", "0.02", backend=server, certs=("--cert", cert, "--key", key))
    (warning,) = kit.until(lambda: program.events("certificate is not valid"), "the warning")
    assert warning["error"].startswith(f"{cert}: the certificate expired on 20")
    assert re.search("^subject=CN ?= ?localhost$", kit.s_client(program.tls_port), re.MULTILINE)
    assert program.fetch("/readyz")[0] == 503
    flags = ("--cert", cert, "--key", key, "--backend", server.address, "--check")
    done = finished("fumi-edge", *flags)
    assert (done.returncode, done.stderr) == (2, f"Error: {warning['error']}\n")
    assert len(program.events("certificate is not valid")) == 1


def test_an_expired_ca_certificate_is_warned_of_and_fails_the_check(backend, edge, authority, kit, tmp_path):
    (cert, key), (expired, _) = authority.issue("localhost"), authority.issue("Old CA", days=-1, is_ca=True)
    chain, server = tmp_path / "chain.pem", backend()
    chain.write_text(cert.read_text() + expired.read_text())
    flags = ("--cert", chain, "--key", key, "--client-ca", expired)
    program = edge(backend=server, certs=flags)
    warnings = kit.until(lambda: program.events("CA certificate is not valid"), "the warnings")
    assert [entry["level"] for entry in warnings] == ["warning", "warning"]
    done = finished("fumi-edge", *flags, "--backend", server.address, "--check")
    assert done.returncode == 2
    for path, warning in zip((chain, expired), warnings, strict=True):
        assert f"{path}: the CA certificate 'Old CA' expired on 20" in warning["error"]
        assert warning["error"] in done.stderr
    assert program.fetch("/readyz")[0] == 200  # the certificate itself is valid
    assert finished("fumi-edge", "--cert", cert, "--key", key, "--backend", server.address, "--check").returncode == 0


def swap_under_load(program, authority, files, pairs, seconds, every, pause):
    """Handshakes without end by two clients while the files are swapped.

    Returns what failed, the serial numbers seen, and the most seconds for which certificate and key were apart.
    """
    seen, failures, stop, longest = set(), [], threading.Event(), 0.0
    context = ssl.create_default_context(cafile=authority.path)

    def knock():
        while not stop.wait(pause):
            try:
                raw = socket.create_connection(("127.0.0.1", program.tls_port), 30)
                with context.wrap_socket(raw, server_hostname="localhost") as client:
                    seen.add(client.getpeercert()["serialNumber"])
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


def test_no_handshake_fails_while_certificates_are_swapped(backend, edge, authority, files, kit):
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
def test_no_handshake_fails_in_a_minute_of_swaps(backend, edge, authority, files, kit):
    pairs = [authority.issue("localhost"), authority.issue("localhost")]
    put(pairs[0], *files)
    program = edge("--cert-reload-interval", "0.5", backend=backend(), certs=("--cert", files[0], "--key", files[1]))
    failures, seen, _ = swap_under_load(program, authority, files, pairs, seconds=60, every=1, pause=0.04)
    assert failures == []
    assert seen == {serial(cert) for cert, _ in pairs}


def test_what_serves_nobody_is_said_at_the_start(backend, edge, kit, make_authority, tmp_path):
    authority = make_authority("An authority")
    both = tmp_path / "localhost.pem"
    both.write_text("".join(path.read_text() for path in authority.issue("localhost")))
    shutil.copy(authority.path, tmp_path)
    server = backend()
    ciphers = ("--ciphers", "ECDHE-RSA-AES128-GCM-SHA256")
    program = edge(*ciphers, backend=server, certs=("--cert", tmp_path))
    (mismatch,) = kit.until(lambda: program.events("no cipher for the certificates"), "the warning")
    (skipped,) = program.events("certificate skipped")
    assert (skipped["level"], mismatch["level"]) == ("info", "warning")
    assert skipped["error"].startswith(f"{tmp_path}/ca.pem: holds no private key")
    done = finished("fumi-edge", "--cert", tmp_path, "--backend", server.address, *ciphers, "--check")
    assert (done.returncode, done.stderr) == (2, f"Error: {mismatch['error']}\n")


def test_a_fifo_among_the_certificates_holds_up_no_renewal(backend, edge, authority, tmp_path, shown, kit):
    old, new, first, second = authority.issue("localhost"), authority.issue("localhost"), tmp_path / "a.pem", tmp_path / "b.pem"
    first.write_text("".join(path.read_text() for path in old))
    program = edge("--cert-reload-interval", "0.05", "--workers", "2", backend=backend(), certs=("--cert", tmp_path))
    os.mkfifo(second)
    (skipped, *_) = kit.until(lambda: program.events("certificate skipped"), "the line about the FIFO")
    assert skipped["error"] == f"{second}: cannot read the certificate: it is not a regular file"
    (tmp_path / "new").write_text("".join(path.read_text() for path in new))
    (tmp_path / "new").rename(first)
    kit.until(lambda: {shown(program) for _ in range(4)} == {serial(new[0])}, "the new certificate")
    program.process.send_signal(signal.SIGHUP)
    kit.until(lambda: program.events("reloaded"), "the reload")


def test_a_file_system_that_hangs_is_reported_and_the_others_are_renewed(authority, tmp_path, caplog, kit, monkeypatch):
    monkeypatch.setattr(files_module, "FILE_TIMEOUT", 0.05)
    hangs, answer, real = threading.Event(), threading.Event(), os.stat
    paths = [tmp_path / "local.pem", tmp_path / "nfs" / "far.pem"]
    (tmp_path / "nfs").mkdir()

    def write(name, path):
        (tmp_path / "new").write_text("".join(each.read_text() for each in authority.issue(name)))
        (tmp_path / "new").rename(path)

    def stat(path, *arguments, **options):
        if hangs.is_set() and str(path) == str(paths[1]):
            answer.wait()
        return real(path, *arguments, **options)

    for path in paths:
        write("old.test", path)
    certificates = Certificates([(path, None) for path in paths])
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, [], "1")
    monkeypatch.setattr(os, "stat", stat)

    def names():
        return [entry.name for entry in certificates.entries]

    async def scenario():
        reloader = Reloader(certificates, metrics, 0.01)
        reloader.start()
        hangs.set()
        write("new.test", paths[0])
        while names() != ["new.test", "old.test"]:
            await asyncio.sleep(0.01)
        while not registry.get_sample_value("fumi_edge_certificate_reloads_total", {"result": "failed"}):
            await asyncio.sleep(0.01)
        hangs.clear()
        answer.set()
        write("newer.test", paths[1])
        while names() != ["new.test", "newer.test"]:
            await asyncio.sleep(0.01)
        await reloader.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    (line,) = {record.getMessage() for record in caplog.records if "certificate not loaded" in record.getMessage()}
    assert f"{paths[1]}: cannot read" in line
    assert "no answer within" in line


def test_what_is_renewed_while_the_edge_starts_is_noticed(authority, tmp_path, monkeypatch):
    """Between the reading of a file and the first look at it there may be seconds, with a thousand certificates."""
    path = tmp_path / "a.pem"
    path.write_text("".join(each.read_text() for each in authority.issue("old.test")))
    real, renewed = certificates_module.load, []

    def load(pair, previous=None):
        certificate = real(pair, previous)
        if not renewed:
            renewed.append(1)
            (tmp_path / "new").write_text("".join(each.read_text() for each in authority.issue("new.test")))
            (tmp_path / "new").rename(path)
        return certificate

    monkeypatch.setattr(certificates_module, "load", load)
    certificates = Certificates([(tmp_path, None)])
    assert [entry.name for entry in certificates.entries] == ["old.test"]

    async def scenario():
        reloader = Reloader(certificates, EdgeMetrics(CollectorRegistry(), [], "1"), 3600)
        reloader.start()
        await reloader.first_look()
        await reloader.close()

    asyncio.run(scenario())
    assert [entry.name for entry in certificates.entries] == ["new.test"]


class Troubled:
    """Certificates whose files cannot be looked at for a while."""

    entries = served = skipped = ()
    selection = SimpleNamespace(until=float("inf"))
    startup_problem = staticmethod(lambda: None)
    authority_problems = staticmethod(lambda now: [])
    stamp_read = ()

    def __init__(self, *troubles):
        self.troubles = list(troubles)
        self.looks = 0

    def stamp(self):
        self.looks += 1
        if self.troubles:
            raise self.troubles.pop(0)
        return ()


def test_a_look_that_fails_is_counted_and_not_the_last(caplog, kit):
    certificates = Troubled(*(PermissionError(13, "Permission denied", "/k") for _ in range(3)), KeyError("ours"))
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, [], "1")

    async def scenario():
        reloader = Reloader(certificates, metrics, 0.001)
        reloader.start()
        while certificates.looks < 7:
            await asyncio.sleep(0.001)
        await reloader.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert registry.get_sample_value("fumi_edge_certificate_reloads_total", {"result": "failed"}) == 4
    # The same trouble once and in a line; what is no trouble of the system's with all there is to know.
    assert [(record.getMessage(), bool(record.exc_info)) for record in caplog.records] == [
        ("reload failed error=\"[Errno 13] Permission denied: '/k'\"", False),
        ("reload failed", True),
    ]
