"""Reloads that cannot read everything: bad files, hanging file systems, changes during the start."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

import fumi_core.runtime.files as files_module
import fumi_edge.program.work as work_module
import fumi_edge.tls.certificates as certificates_module
from fumi_core.runtime.addresses import parse_address
from fumi_core.runtime.scoreboard import count_of_one_process
from fumi_core.runtime.settings import SettingError
from fumi_edge.backends.dialing import Remote
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.certificate_reload import Reloader
from fumi_edge.edge import Edge
from fumi_edge.metrics import EdgeMetrics
from fumi_edge.program.flag_source import Again, FlagSource
from fumi_edge.program.work import EdgeWork
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import Certificate, Pair
from fumi_edge.tls.pem import load as load_pem
from fumi_edge.tls.policy import CertificateSettings
from tests.edge.backends import StartBackend
from tests.edge.metrics import reloads
from tests.edge.program import StartEdge
from tests.edge.renewal import put
from tests.support.certificates import Authority, CertificateFiles, serial
from tests.support.waiting import until


@pytest.mark.parametrize("case", ["half", "key missing", "other key", "gone", "expired"])
def test_a_bad_file_leaves_the_old_certificate_in_service(
    backend: StartBackend, edge: StartEdge, authority: Authority, files: CertificateFiles, shown: Callable[..., str], case: str
) -> None:
    """It is counted and reported once, not at every check, and again at SIGHUP; the next change is loaded."""
    old, new, expired = authority.issue("localhost"), authority.issue("localhost"), authority.issue("localhost", days=-1)
    put(old, *files)
    program = edge("--cert-reload-interval", "0.1", backend=backend(), certs=("--cert", files[0], "--key", files[1]))

    def spoil() -> None:
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

    def reports() -> int:
        return len(program.events("certificate not loaded"))

    spoil()
    until(reports, "the complaint")
    time.sleep(0.3)  # and there have been looks
    assert (reports(), reloads(program, "failed")) == (1, 1)
    assert reloads(program, "deferred") >= 1
    assert shown(program) == serial(old[0])
    program.process.send_signal(signal.SIGHUP)
    until(lambda: reports() == 2, "the answer to the signal")
    assert reloads(program, "failed") == 2
    assert shown(program) == serial(old[0])
    put(new, *files)
    until(lambda: shown(program) == serial(new[0]), "the good certificate")
    assert reports() == 2


def test_one_bad_file_does_not_hold_up_the_others(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path, shown: Callable[..., str]
) -> None:
    first, second, new = authority.issue("first.test"), authority.issue("second.test"), authority.issue("second.test")
    pairs = [(tmp_path / f"{number}.pem", tmp_path / f"{number}.key") for number in (1, 2)]
    put(first, *pairs[0])
    put(second, *pairs[1])
    certs = ("--cert", pairs[0][0], "--key", pairs[0][1], "--cert", pairs[1][0], "--key", pairs[1][1])
    program = edge("--cert-reload-interval", "0", backend=backend(), certs=certs)
    pairs[0][0].write_text("nonsense")
    put(new, *pairs[1])
    program.process.send_signal(signal.SIGHUP)
    until(lambda: reloads(program, "failed") == 1, "the complaint")
    assert shown(program, "first.test") == serial(first[0])
    assert shown(program, "second.test") == serial(new[0])


def test_a_fifo_among_the_certificates_holds_up_no_renewal(
    backend: StartBackend, edge: StartEdge, authority: Authority, tmp_path: Path, shown: Callable[..., str]
) -> None:
    old, new, first, second = authority.issue("localhost"), authority.issue("localhost"), tmp_path / "a.pem", tmp_path / "b.pem"
    first.write_text("".join(path.read_text() for path in old))
    program = edge("--cert-reload-interval", "0.05", "--workers", "2", backend=backend(), certs=("--cert", tmp_path))
    os.mkfifo(second)
    (skipped, *_) = until(lambda: program.events("certificate skipped"), "the line about the FIFO")
    assert skipped["error"] == f"{second}: cannot read the certificate: it is not a regular file"
    (tmp_path / "new").write_text("".join(path.read_text() for path in new))
    (tmp_path / "new").rename(first)
    until(lambda: {shown(program) for _ in range(4)} == {serial(new[0])}, "the new certificate")
    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.events("reloaded"), "the reload")


def test_a_file_system_that_hangs_is_reported_and_the_others_are_renewed(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "FILE_TIMEOUT", 0.05)
    hangs, answer, real = threading.Event(), threading.Event(), os.stat
    paths = [tmp_path / "local.pem", tmp_path / "nfs" / "far.pem"]
    (tmp_path / "nfs").mkdir()

    def write(name: str, path: Path) -> None:
        (tmp_path / "new").write_text("".join(each.read_text() for each in authority.issue(name)))
        (tmp_path / "new").rename(path)

    def stat(path: str | Path, *arguments: Any, **options: Any) -> os.stat_result:
        if hangs.is_set() and str(path) == str(paths[1]):
            answer.wait()
        return real(path, *arguments, **options)

    for path in paths:
        write("old.test", path)
    certificates = Certificates([(path, None) for path in paths])
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, [], "1")
    monkeypatch.setattr(os, "stat", stat)

    def names() -> list[str]:
        return [entry.name for entry in certificates.entries]

    async def scenario() -> None:
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


def test_a_settings_file_that_hangs_is_reported_and_does_not_hold_up_the_next_reload(
    certificate: CertificateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "READ_TIMEOUT", 0.1)
    monkeypatch.setattr(work_module, "_tune_garbage_collector", lambda: None)  # it is for a process of its own
    hanging = threading.Event()

    class Hanging(FlagSource):
        def __init__(self) -> None:
            self.asked = 0

        def read_again(self, *loaded: object) -> Again:
            self.asked += 1
            hanging.wait()
            raise AssertionError

    async def scenario() -> None:
        flags = Hanging()
        settings = EdgeSettings(certificates=own, backends=BackendSettings((Remote(parse_address("127.0.0.1:1")),)))
        work = EdgeWork(Edge(settings, {own: certificates}), flags=flags)
        await work.start(count_of_one_process())
        for asked in (1, 2):
            with pytest.raises(SettingError, match="not read within"):
                await work.reload()
            assert flags.asked == asked
        await work.close()

    certificates = Certificates([Pair(str(certificate[0]), str(certificate[1]))])
    own = CertificateSettings(tuple(certificates.sources), certificates.policy)
    try:
        asyncio.run(scenario())
    finally:
        hanging.set()


def test_what_is_renewed_while_the_edge_starts_is_noticed(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading of a file and the first look at it there may be seconds, with a thousand certificates."""
    path = tmp_path / "a.pem"
    path.write_text("".join(each.read_text() for each in authority.issue("old.test")))
    renewed: list[str] = []

    def load(pair: Pair, previous: Certificate | None = None) -> Certificate:
        certificate = load_pem(pair, previous)
        if not renewed:
            renewed.append("new.test")
            (tmp_path / "new").write_text("".join(each.read_text() for each in authority.issue("new.test")))
            (tmp_path / "new").rename(path)
        return certificate

    monkeypatch.setattr(certificates_module, "load", load)
    certificates = Certificates([(tmp_path, None)])
    assert [entry.name for entry in certificates.entries] == ["old.test"]

    async def scenario() -> None:
        reloader = Reloader(certificates, EdgeMetrics(CollectorRegistry(), [], "1"), 3600)
        reloader.start()
        await reloader.first_check()
        await reloader.close()

    asyncio.run(scenario())
    assert [entry.name for entry in certificates.entries] == ["new.test"]


class Troubled:
    """Certificates whose files cannot be looked at for a while."""

    entries = served = skipped = ()
    selection = SimpleNamespace(until=float("inf"))
    startup_problem = staticmethod(lambda: None)

    @staticmethod
    def authority_problems(now: float) -> list[str]:
        return []

    stamp_read = ()

    def __init__(self, *troubles: Exception) -> None:
        self.troubles = list(troubles)
        self.looks = 0

    def stamp(self) -> tuple[()]:
        self.looks += 1
        if self.troubles:
            raise self.troubles.pop(0)
        return ()


def test_a_look_that_fails_is_counted_and_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    certificates = Troubled(*(PermissionError(13, "Permission denied", "/k") for _ in range(3)), KeyError("ours"))
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, [], "1")

    async def scenario() -> None:
        reloader = Reloader(cast(Certificates, certificates), metrics, 0.001)
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
