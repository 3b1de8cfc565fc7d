"""Real engines follow ops/README.md: Docker builds, starts, reloads, stops and upgrades the composition; podman runs it, too.

The tests of an engine share its composition, in this order; each leaves it serving mail.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fumi_core.version import VERSION
from tests.bench import environment
from tests.engines.container_engine import (
    COMPOSE,
    NAME,
    PAIR,
    PROMETHEUS_IMAGE,
    START,
    TRY,
    UPGRADE,
    ContainerEngine,
    Docker,
    Podman,
)
from tests.support.certificates import CertificateFiles, self_signed, shown_pem
from tests.support.hosts import Host, network
from tests.support.inside import Client
from tests.support.load import Load
from tests.support.readme import ROOT
from tests.support.verdict import Verdict
from tests.support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.getuid() != 0, reason="only root starts engines")]
RATE = 8.0
"""Messages a second."""
FEW = 40
"""Messages that are accepted before and after an upgrade."""
ADDRESSES = {"engine": "fd07::1", "client": "fd07::9"}
SIGNAL, RENEWAL = UPGRADE.splitlines()[1], "".join(START.splitlines(keepends=True)[2:4])
Started = tuple[ContainerEngine, Host]


@contextlib.contextmanager
def started(kind: type[ContainerEngine], certificate: CertificateFiles) -> Iterator[Started]:
    """An engine of this kind, which has done what the page says, and a client's host on the same switch."""
    environment.INSTALLED.mkdir(exist_ok=True)
    with network(engine=1, client=9) as hosts, tempfile.TemporaryDirectory(dir=environment.INSTALLED) as directory:
        for name, address in ADDRESSES.items():
            hosts[name].ip(f"address add {address}/64 dev eth0 nodad")
        with contextlib.closing(kind(hosts["engine"], Path(directory), certificate, PAIR)) as engine:
            settings, up = START.rsplit("\n", 2)[:2]
            engine.run(settings)
            if engine.prometheus_image != PROMETHEUS_IMAGE:
                engine.run(f"echo PROMETHEUS_IMAGE={engine.prometheus_image} >>ops/docker/.env")
            engine.run(up)
            await_mail(engine)
            yield engine, hosts["client"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return self_signed(tmp_path_factory.mktemp("certificate"), NAME)


@pytest.fixture(scope="module")
def docker(certificate: CertificateFiles) -> Iterator[Started]:
    with started(Docker, certificate) as found:
        yield found


@pytest.fixture(scope="module")
def podman(certificate: CertificateFiles) -> Iterator[Started]:
    with started(Podman, certificate) as found:
        yield found


def get(host: Host, url: str) -> str | None:
    """What a URL has, asked from that host; None if nothing answers with 200."""
    done = subprocess.run(host.command("curl", "--silent", "--fail", url), capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout


def await_mail(engine: ContainerEngine) -> None:
    """Wait until edge and core say that they can accept mail."""
    until(lambda: all(get(engine.host, f"http://127.0.0.1:{port}/readyz") for port in (9465, 9525)), "readiness")


def smtp(client: Host, certificate: Path | None, address: str = "10.7.0.1", port: int = 25) -> Client:
    """A connection from the client's host; None trusts any certificate."""
    tls = ssl.create_default_context(cafile=certificate)
    if certificate is None:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return Client(client.pid, (address, port), tls, NAME)


def send(client: Host, certificate: Path, address: str = "10.7.0.1") -> None:
    """Send a message over STARTTLS, to a server that gives the host's name."""
    with smtp(client, certificate, address) as connected:
        assert connected.ehlo()[1].startswith(NAME.encode())
        connected.starttls(context=ssl.create_default_context(cafile=certificate))
        connected.sendmail("ann@example.net", ["joe@example.org"], "Subject: lunch\r\n\r\nhi\r\n")


def served(client: Host) -> str:
    """The certificate on port 465, as PEM."""
    with smtp(client, None, port=465) as connected:
        assert isinstance(connected.sock, ssl.SSLSocket)
        return shown_pem(connected.sock)


def test_the_image_has_both_programs_and_labels(docker: Started) -> None:
    engine, _ = docker
    (build,) = re.findall(r"^# (docker build .*?)  ", (ROOT / "ops/docker/Dockerfile").read_text(), re.MULTILINE)
    engine.run(build)
    for words, said in (("--version", "fumi-edge"), ("fumi-core --version", "fumi-core"), ("fumi-edge --version", "fumi-edge")):
        assert engine.run(f"docker run --rm fumi {words}") == f"{said}, version {VERSION}\n"
    labels = json.loads(engine.run("docker image inspect --format '{{json .Config.Labels}}' fumi"))
    assert labels["org.opencontainers.image.version"] == VERSION


@pytest.mark.parametrize(("to", "client_address"), [("10.7.0.1", "10.7.0.9"), ("fd07::1", "IPv6:fd07::9")])
def test_a_client_keeps_its_address_and_gets_the_hosts_name(
    to: str, client_address: str, docker: Started, certificate: CertificateFiles
) -> None:
    engine, client = docker
    send(client, certificate[0], to)
    (message,) = (each for each in engine.inbox.messages() if f"([{client_address}])" in each.headers)
    assert f" by {NAME} with ESMTPS id " in message.headers


def test_the_page_says_how_to_see_that_it_works(docker: Started) -> None:
    engine, _ = docker
    services, send_one, stored = TRY.splitlines()
    assert all(f"fumi-{name}-1 " in engine.run(services) for name in ("edge", "core", "prometheus"))
    said = subprocess.run(engine.host.command("sh", "-euc", send_one), capture_output=True, text=True, check=True).stdout
    (name,) = re.findall(r" 250 2\.0\.0 Ok: queued as (\S+)", said)
    assert name.endswith(NAME)
    assert name in engine.run(stored).split()


def test_pages_are_published_for_the_host_alone(docker: Started) -> None:
    engine, client = docker
    for port, program in ((9465, "fumi-edge"), (9525, "fumi-core")):
        page = get(engine.host, f"http://127.0.0.1:{port}/")
        assert page is not None
        assert program in page
        assert NAME in page
        assert get(client, f"http://10.7.0.1:{port}/") is None


def test_both_become_healthy_and_their_logs_are_limited(docker: Started) -> None:
    engine, _ = docker
    for service in ("edge", "core"):
        until(lambda service=service: engine.inspect(service, ".State.Health.Status") == "healthy", service)  # type: ignore[misc]
        assert json.loads(engine.inspect(service, "json .HostConfig.LogConfig.Config")).keys() == {"max-size", "max-file"}


def alerts(host: Host) -> list[str]:
    """The names of the alerts that the Prometheus there knows."""
    groups = json.loads(get(host, "http://127.0.0.1:9090/api/v1/rules") or '{"data": {"groups": []}}')["data"]["groups"]
    return [rule["name"] for group in groups for rule in group["rules"] if rule["type"] == "alerting"]


def test_prometheus_scrapes_both_and_reads_rules_that_git_has_replaced(docker: Started) -> None:
    engine, _ = docker
    up = "http://127.0.0.1:9090/api/v1/query?query=sum(up)"
    until(lambda: '"2"]' in (get(engine.host, up) or ""), "two targets")
    assert "FumiTargetDown" in alerts(engine.host)
    engine.run("cd ops/prometheus; sed s/FumiTargetDown/FumiOther/ rules.yml >new; mv new rules.yml")
    engine.run(SIGNAL)
    until(lambda: "FumiOther" in alerts(engine.host), "the new rule")


def test_a_renewal_is_served_and_sighup_ends_nothing(docker: Started, certificate: CertificateFiles, tmp_path: Path) -> None:
    engine, client = docker
    assert served(client) == certificate[0].read_text()
    began = [engine.inspect(service, ".State.StartedAt") for service in ("edge", "core")]
    for files in (self_signed(tmp_path, NAME), certificate):
        for source, name in zip(files, ("fullchain.pem", "privkey.pem"), strict=True):
            engine.path(f"/etc/letsencrypt/live/{NAME}/{name}").write_bytes(source.read_bytes())
        engine.run(RENEWAL)
        engine.run(f"{COMPOSE} kill --signal HUP edge core")
        until(lambda files=files: served(client) == files[0].read_text(), "the new certificate")  # type: ignore[misc]
    assert [engine.inspect(service, ".State.StartedAt") for service in ("edge", "core")] == began


def stop_with_a_session_open(engine: ContainerEngine, client: Host, certificate: Path) -> None:
    """Stop both as an operator does, while a client is sending a message, which is accepted."""
    for service in ("edge", "core"):
        words = engine.run(f"{engine.program} exec {engine.container(service)} cat /proc/1/cmdline").split("\0")
        assert Path(words[1]).name == f"fumi-{service}"
    session, stored = smtp(client, certificate, port=465), len(engine.inbox)
    session.ehlo()
    assert session.mail("ann@example.net")[0] == 250
    with subprocess.Popen(
        engine.command(f"{COMPOSE} stop edge core"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as stop:
        until(lambda: all("draining" in engine.log(service) for service in ("edge", "core")), "the drain")
        assert session.rcpt("joe@example.org")[0] == 250
        assert session.data("Subject: late\r\n\r\nhi\r\n")[0] == 250
        session.close()
        assert stop.wait(60) == 0
    assert [engine.inspect(service, ".State.ExitCode") for service in ("edge", "core")] == ["0", "0"]
    assert len(engine.inbox) == stored + 1


def test_sigterm_reaches_process_1_which_drains_a_session(docker: Started, certificate: CertificateFiles) -> None:
    engine, client = docker
    stop_with_a_session_open(engine, client, certificate[0])
    engine.run(f"{COMPOSE} up --detach")
    await_mail(engine)


def upgrade(engine: ContainerEngine) -> None:
    """Follow the page with another version."""
    engine.run("echo 'VERSION = \"9.9\"' >>fumi_core/version.py")
    engine.run(UPGRADE)
    for service in ("edge", "core"):
        command = f"{engine.program} exec {engine.container(service)} fumi-{service} --version"
        assert engine.run(command).endswith("version 9.9\n")


def test_an_upgrade_replaces_both_at_once_and_loses_nothing(
    docker: Started, certificate: CertificateFiles, tmp_path: Path
) -> None:
    engine, client = docker
    load = Load(client, "10.7.0.1", RATE, certificate[0], tmp_path)
    load.await_accepted(FEW)
    began = engine.run("date +%s").strip()
    upgrade(engine)
    load.await_accepted(FEW)
    verdict = load.finish(lambda: [each.text.decode() for each in engine.inbox.messages()])
    events = engine.run(
        f"docker events --since {began} --until $(date +%s) --filter type=container --format '{{{{.Action}}}}'"
    ).split()
    assert [each for each in events if each in ("kill", "die")][:2] == ["kill", "kill"]
    refused = [each for each in load.attempts() if not each.accepted]
    print("", Verdict.HEAD, verdict.row("docker compose up, new image"), sep="\n")
    print(f"attempts refused for {max(each.ended for each in refused) - min(each.began for each in refused):.1f} s")
    assert verdict.problems() == []


def test_podman_compose_runs_the_same(podman: Started, certificate: CertificateFiles) -> None:
    engine, client = podman
    send(client, certificate[0])
    (message,) = engine.inbox.messages()
    assert "([10.7.0.9])" in message.headers
    engine.run(SIGNAL)
    engine.run(f"{COMPOSE} kill --signal HUP edge core")
    assert served(client) == certificate[0].read_text()
    stop_with_a_session_open(engine, client, certificate[0])


def test_podman_compose_upgrades(podman: Started) -> None:
    engine, _ = podman
    engine.run(f"{COMPOSE} up --detach")
    await_mail(engine)
    upgrade(engine)
    await_mail(engine)
