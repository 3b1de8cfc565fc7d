"""ops/README.md: a section for each alert, commands that work, files that are there, and an upgrade that loses nobody."""

from __future__ import annotations

import os
import re
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "ops" / "README.md").read_text()
RULES = (ROOT / "ops" / "prometheus" / "rules.yml").read_text()
SHELL = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
INSTALL, START, CERTS, COMPOSE, SYSCTL, UPGRADE, NEXT, PROMTOOL, JOURNAL = SHELL
YAML = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
STUBS = ("systemctl", "systemd-sysusers", "certbot", "chown", "docker")


def test_every_alert_says_what_to_do_and_nothing_else_does() -> None:
    section = README.partition("\n## Alerts\n")[2]
    told = re.findall(r"^### (\w+)\n(?=\S)", section, re.MULTILINE)
    assert told == re.findall(r"^### (.*)$", section, re.MULTILINE)
    assert sorted(told) == sorted(re.findall(r"- alert: (\w+)", RULES))


def test_what_it_names_is_there(programs: Any) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / "ops" / link).exists(), link
    # But for what an operator puts there.
    for path in re.findall(r"\bops/(?!docker/certs|docker/\.env)[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
    flags = set(re.findall(r"`(--[a-z-]+)", README)) | set(re.findall(r"(?<= )(--(?:metrics|config|check))\b", "".join(SHELL)))
    helps = "".join(programs.run(programs.bin / name, "--help") for name in ("fumi-core", "fumi-edge"))
    assert {flag for flag in flags - {"--workers"} if flag not in helps} == set()
    dashboard = (ROOT / "ops" / "grafana" / "fumi.json").read_text()
    for metric in re.findall(r"`(fumi_(?:core|edge)[\w:]+)", README):
        assert metric in dashboard, metric


@pytest.fixture
def host(programs: Any) -> Callable[[str], str]:
    """Runs commands as root would on a host of its own: under another /etc, where systemctl only says what it was told."""
    root = programs.directory / "root"
    tools = programs.directory / "tools"
    for directory in (root / "run" / "systemd" / "system", tools):
        directory.mkdir(parents=True)
    for name in STUBS:
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tools / name).chmod(0o755)
    shutil.copytree(ROOT / "ops", programs.directory / "ops")

    def run(text: str) -> str:
        text = re.sub(r"(?<![\w.])/(?=(?:etc|run)/)", f"{root}/", text)
        if os.getuid() != 0:
            text = re.sub(r" -o [\w-]+", "", text)
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "FUMI_CERTS": f"{root}/etc/fumi/certs"}
        return str(programs.run("sh", "-euc", text.replace("/opt/fumi/bin", str(programs.bin)), **environment))

    return run


def lineage(programs: Any, certificate: tuple[Path, Path]) -> Path:
    """What certbot keeps of a certificate."""
    live: Path = programs.directory / "root" / "etc" / "letsencrypt" / "live" / "mx.example.org"
    live.mkdir(parents=True)
    for source, name in zip(certificate, ("fullchain.pem", "privkey.pem"), strict=True):
        shutil.copy(source, live / name)
    return live


def test_the_installation_puts_everything_where_the_units_look(
    host: Callable[[str], str], programs: Any, certificate: tuple[Path, Path]
) -> None:
    assert host(INSTALL) == "systemd-sysusers\n"
    root = programs.directory / "root"
    lineage(programs, certificate)
    said = host(START)
    assert "systemctl enable --now fumi-core fumi-edge\n" in said
    assert (root / "etc" / "fumi" / "certs" / "mx.example.org.pem").read_text().count("-----BEGIN") == 2
    units = {path.name for path in (root / "etc" / "systemd" / "system").iterdir()}
    assert units == {path.name for path in (ROOT / "ops" / "systemd").glob("*.s[eo]*") if path.suffix in (".service", ".socket")}
    # The second edge of an upgrade is a unit as good as the first, on other metrics.
    assert host(NEXT).splitlines()[0] == "systemctl daemon-reload"
    unit = (root / "run" / "systemd" / "system" / "fumi-edge-next.service").read_text()
    first = (ROOT / "ops" / "systemd" / "fumi-edge.service").read_text()
    (changed,) = set(unit.splitlines()) - set(first.splitlines())
    assert changed.endswith("--starttls-listen fd:submission --metrics 127.0.0.1:9466")


def test_the_commands_that_look_at_things_find_them(host: Callable[[str], str]) -> None:
    assert host(CERTS).endswith("dev/mx.example.org.pem: OK\ndev/joe-client.pem: OK\n")
    assert host(PROMTOOL).count("SUCCESS") >= 2
    for name in re.findall(r"[a-z]+\.[\w.]+", SYSCTL) + re.findall(r"`((?:net|fs)\.[\w.]+)`", README):
        # The table of connections is there once a firewall has asked for it.
        assert "nf_conntrack" in name or Path("/proc/sys", *name.split(".")).exists(), name


def test_the_check_before_an_upgrade_takes_the_settings_that_are_shipped(host: Callable[[str], str], programs: Any) -> None:
    check = next(line for line in UPGRADE.splitlines() if line.endswith("--check"))
    host(INSTALL)
    path = programs.directory / "root" / "etc" / "fumi" / "fumi.toml"
    path.write_text(path.read_text().replace("/var/lib/fumi-core", str(programs.directory)))
    assert "settings are good" in host(check)


def test_the_composition_finds_its_domain_and_its_certificate(
    host: Callable[[str], str], programs: Any, certificate: tuple[Path, Path]
) -> None:
    live = lineage(programs, certificate)
    assert host(COMPOSE) == "docker compose -f ops/docker/compose.yml up --build --detach\n"
    docker = programs.directory / "ops" / "docker"
    (name,) = re.findall(r"\$\{(\w+):\?", (docker / "compose.yml").read_text())
    assert (docker / ".env").read_text() == f"{name}=example.org\n"
    (file,) = (docker / "certs").iterdir()
    assert file.read_bytes() == (live / "fullchain.pem").read_bytes() + (live / "privkey.pem").read_bytes()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (docker / "certs", file)] == [0o700, 0o600]
    if os.getuid() == 0:
        assert {path.stat().st_uid for path in (docker / "certs", file)} == {10001}


def test_the_job_is_named_as_the_alerts_know_it(programs: Any) -> None:
    (relabelling,) = (text for text in YAML if "relabel_configs" in text)
    # Debian's Prometheus knows no Kubernetes; relabelling is the same everywhere.
    config = f"scrape_configs:\n- job_name: pods\n{textwrap.indent(relabelling, '  ')}"
    (programs.directory / "prometheus.yml").write_text(config)
    assert "SUCCESS" in programs.run("promtool", "check", "config", programs.directory / "prometheus.yml")
    names = re.findall(r"app.kubernetes.io/name: (.+?)}", (ROOT / "ops" / "kubernetes" / "edge.yaml").read_text())
    known = re.findall(r'job=~"([^"]+)"', RULES)
    assert all(re.fullmatch(pattern, names[0]) for pattern in [*known, re.findall("regex: (.*)", relabelling)[0]])


Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """What systemd holds."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock


@pytest.fixture
def start_edge(programs: Any, listener: socket.socket, certificate: tuple[Path, Path]) -> Iterator[Start]:
    """Starts edges on that socket, as an upgrade does: each ready when this returns."""
    core = programs.free_port()
    programs.start(programs.bin / "fumi-core", "--listen", f"127.0.0.1:{core}", port=core, log="core.log")
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        metrics = programs.free_port()
        flags = [f"--listen=fd:{listener.fileno()}", f"--cert={certificate[0]}", f"--key={certificate[1]}"]
        flags += [f"--backend=127.0.0.1:{core}", f"--metrics=127.0.0.1:{metrics}"]
        log = programs.directory / f"edge{len(started)}.log"
        with log.open("wb") as output:
            edge = subprocess.Popen([programs.bin / "fumi-edge", *flags], stderr=output, pass_fds=[listener.fileno()])
        started.append(edge)
        programs.until(lambda: "metrics port=" in log.read_text() or edge.poll() is not None, "the start of an edge")
        return edge

    yield start
    for edge in started:
        edge.kill()
        edge.wait()


def connect(listener: socket.socket, certificate: Path) -> smtplib.SMTP_SSL:
    context = ssl.create_default_context(cafile=str(certificate))
    return smtplib.SMTP_SSL("127.0.0.1", listener.getsockname()[1], context=context, timeout=60)


def send(smtp: smtplib.SMTP) -> None:
    assert smtp.sendmail("a@b.example", ["c@d.example"], "hi") == {}


def test_a_restart_loses_neither_who_is_connected_nor_who_comes_meanwhile(
    start_edge: Start, listener: socket.socket, certificate: tuple[Path, Path]
) -> None:
    first = start_edge()
    connected = connect(listener, certificate[0])
    first.send_signal(signal.SIGTERM)
    send(connected)
    connected.quit()
    assert first.wait(60) == 0
    # Nobody accepts now; the kernel takes the connection all the same.
    with socket.create_connection(listener.getsockname()) as early:
        start_edge()
        context = ssl.create_default_context(cafile=str(certificate[0]))
        early.settimeout(60)
        with context.wrap_socket(early, server_hostname="127.0.0.1") as tls:
            assert tls.recv(4096).startswith(b"220 ")


def test_a_second_edge_serves_the_same_socket_while_the_first_drains(
    start_edge: Start, listener: socket.socket, certificate: tuple[Path, Path]
) -> None:
    first = start_edge()
    connected = connect(listener, certificate[0])
    start_edge()
    first.send_signal(signal.SIGTERM)
    for _ in range(5):
        with connect(listener, certificate[0]) as smtp:
            send(smtp)
    assert first.poll() is None
    send(connected)
    connected.quit()
    assert first.wait(60) == 0
