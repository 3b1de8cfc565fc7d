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

import pytest

from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
README = (ROOT / "ops" / "README.md").read_text()
RULES = (ROOT / "ops" / "prometheus" / "rules.yml").read_text()
SHELL = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROGRAMS, INSTALL, START, USERS, CERTS, CORE_HOST, EDGE_HOST, *OTHERS = SHELL
COMPOSE, COMPOSE_CERT, COMPOSE_TRY, COMPOSE_UPGRADE, SYSCTL, UPGRADE, NEXT, BACK, PROMTOOL, JOURNAL, RETENTION = OTHERS
YAML = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
STUBS = ("systemctl", "systemd-sysusers", "certbot", "chown", "docker", "journalctl")
VENV = """#!/bin/sh
mkdir -p "$3/bin"
ln -s {bin}/fumi-core {bin}/fumi-edge "$3/bin"
printf '#!/bin/sh\\necho pip "$@"\\n' >"$3/bin/pip"
chmod +x "$3/bin/pip"
"""
DATE = """#!/bin/sh
echo x >>"$0.calls"
echo "20260101-00000$(wc -l <"$0.calls")"
"""


def test_every_alert_says_what_to_do_and_nothing_else_does() -> None:
    section = README.partition("\n## Alerts\n")[2]
    told = re.findall(r"^### (\w+)\n(?=\S)", section, re.MULTILINE)
    assert told == re.findall(r"^### (.*)$", section, re.MULTILINE)
    assert sorted(told) == sorted(re.findall(r"- alert: (\w+)", RULES))


def test_files_flags_and_metrics_that_it_names_exist(programs: Programs) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / "ops" / link).exists(), link
    # But for what an operator puts there.
    for path in re.findall(r"\bops/(?!docker/certs|docker/\.env)[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
    flags = set(re.findall(r"`(--[a-z-]+)", README)) | set(re.findall(r"(?<= )(--(?:metrics|config|check))\b", "".join(SHELL)))
    helps = "".join(programs.run(BIN / name, "--help") for name in ("fumi-core", "fumi-edge"))
    assert {flag for flag in flags - {"--workers"} if flag not in helps} == set()
    dashboard = (ROOT / "ops" / "grafana" / "fumi.json").read_text()
    for metric in re.findall(r"`(fumi_(?:core|edge)[\w:]+)", README):
        assert metric in dashboard, metric


@pytest.fixture
def host(programs: Programs) -> Callable[[str], str]:
    """Runs commands as root would on a host of its own: under another /etc, where systemctl only says what it was told."""
    root = programs.directory / "root"
    tools = programs.directory / "tools"
    for directory in (root / "run" / "systemd" / "system", root / "opt", tools):
        directory.mkdir(parents=True)
    # A virtual environment is made in no time, of the programs from here; each in a second of its own.
    stubs = dict.fromkeys(STUBS, '#!/bin/sh\necho "${0##*/}" "$@"\n') | {"python3": VENV.format(bin=BIN), "date": DATE}
    for name, text in stubs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    shutil.copytree(ROOT / "ops", programs.directory / "ops")
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")):
        copy = programs.directory / page.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(page, copy)

    def run(text: str, given: bytes = b"") -> str:
        text = re.sub(r"(?<![\w.])/(?=(?:etc|run|opt)/)", f"{root}/", text)
        text = re.sub(r" -[og] [\w-]+" if os.getuid() != 0 else r" -g [\w-]+", "", text)
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "FUMI_CERTS": f"{root}/etc/fumi/certs"}
        return programs.run("sh", "-euc", text, given=given, environment=environment)

    return run


def lineage(programs: Programs, certificate: CertificateFiles) -> Path:
    """What certbot keeps of a certificate."""
    live: Path = programs.directory / "root" / "etc" / "letsencrypt" / "live" / "mx.example.org"
    live.mkdir(parents=True)
    for source, name in zip(certificate, ("fullchain.pem", "privkey.pem"), strict=True):
        shutil.copy(source, live / name)
    return live


def test_the_installation_puts_everything_where_the_units_look(
    host: Callable[[str], str], programs: Programs, certificate: CertificateFiles
) -> None:
    assert host(PROGRAMS) == "pip install .\n"
    assert host(INSTALL) == "systemd-sysusers\n"
    root = programs.directory / "root"
    lineage(programs, certificate)
    said = host(START)
    assert "systemctl enable --now fumi-core fumi-edge\n" in said
    assert (root / "etc" / "fumi" / "certs" / "mx.example.org.pem").read_text().count("-----BEGIN") == 2
    units = {path.name for path in (root / "etc" / "systemd" / "system").iterdir()}
    assert units == {path.name for path in (ROOT / "ops" / "systemd").glob("*.s[eo]*") if path.suffix in (".service", ".socket")}
    # The second edge of an upgrade is a unit as good as the first, on other metrics; and gone in the end.
    making, removing = NEXT.split("rm ")
    assert host(making).splitlines()[0] == "systemctl daemon-reload"
    unit = (root / "run" / "systemd" / "system" / "fumi-edge-next.service").read_text()
    first = (ROOT / "ops" / "systemd" / "fumi-edge.service").read_text()
    (changed,) = set(unit.splitlines()) - set(first.splitlines())
    assert changed.endswith("--starttls-listen fd:submission --metrics 127.0.0.1:9466")
    assert host("rm " + removing) == "systemctl daemon-reload\n"
    assert list((root / "run" / "systemd" / "system").iterdir()) == []


def test_the_commands_that_look_at_things_find_them(host: Callable[[str], str]) -> None:
    assert host(CERTS).endswith("dev/mx.example.org.pem: OK\ndev/joe-client.pem: OK\n")
    assert host(PROMTOOL).count("SUCCESS") >= 2
    for name in re.findall(r"[a-z]+\.[\w.]+", SYSCTL) + re.findall(r"`((?:net|fs)\.[\w.]+)`", README):
        # The table of connections is there once a firewall has asked for it.
        assert "nf_conntrack" in name or Path("/proc/sys", *name.split(".")).exists(), name


def settings(programs: Programs, *more: tuple[str, str]) -> Path:
    """Where the settings that were installed are, for this host under another /etc."""
    root = programs.directory / "root"
    path: Path = root / "etc" / "fumi" / "fumi.toml"
    text = path.read_text()
    here = [
        ("/var/lib/fumi-core", str(programs.directory)),
        ("/etc/", f"{root}/etc/"),
        ("unix:/run/", f"unix:{root}/run/"),
        *more,
    ]
    for before, after in [*here, ("9525", str(free_port())), ("9465", str(free_port()))]:
        assert before in text, before
        text = text.replace(before, after)
    path.write_text(text)
    return path


def test_an_upgrade_checks_the_settings_that_are_shipped_and_can_be_rolled_back(
    host: Callable[[str], str], programs: Programs, certificate: CertificateFiles
) -> None:
    host(PROGRAMS + INSTALL)
    lineage(programs, certificate)
    host(START)
    opt, current = programs.directory / "root" / "opt", programs.directory / "root" / "opt" / "fumi"
    first = current.readlink()
    core: list[str | Path] = ["--config", settings(programs), "--listen", f"unix:{programs.directory}/root/run/fumi-core.socket"]
    programs.start(current / "bin" / "fumi-core", *core, log="core.log")
    until(lambda: "listening" in (programs.directory / "core.log").read_text(), "the core")
    restart = ["systemctl daemon-reload", "systemctl try-restart fumi-core", "systemctl try-restart fumi-edge"]
    units = programs.directory / "root" / "etc" / "systemd" / "system"
    unit = units / "fumi-core.service"
    before = unit.read_text()
    (programs.directory / "ops" / "systemd" / unit.name).write_text(f"{before}# newer\n")
    said = host(UPGRADE).splitlines()
    in_use = [line for line in said if line.endswith(" is already in use (by a running fumi-core or another program)")]
    assert [line for line in said if line not in in_use] == ["pip install .", "configuration OK", "configuration OK", *restart]
    assert len(in_use) == 1  # the metrics' address
    second = current.readlink()
    assert sorted(opt.glob("fumi-*")) == [first, second]
    # What runs is not touched: the new one is another directory.
    assert first.name < second.name
    assert unit.read_text() == f"{before}# newer\n"
    assert host(BACK).splitlines()[-3:] == restart
    assert current.readlink() == first
    assert unit.read_text() == before


def test_only_the_core_can_read_the_users_file(host: Callable[..., str], programs: Programs) -> None:
    host(PROGRAMS + INSTALL)
    assert host(USERS, given=b"secret\n") == "systemctl reload fumi-core\n"
    users = programs.directory / "root" / "etc" / "fumi" / "users"
    assert stat.S_IMODE(users.stat().st_mode) == 0o640
    assert users.read_text().startswith("joe:$scrypt$")
    unit = (ROOT / "ops" / "systemd" / "fumi-core.service").read_text()
    assert re.findall("^User=(.*)", unit, re.MULTILINE) == re.findall("-g ([\\w-]+)", USERS)
    path = settings(programs)
    (line,) = re.findall(r"`(users = .*?)`", README)
    path.write_text(
        path.read_text().replace("[core]\n", "[core]\n" + line.replace("/etc/", f"{programs.directory}/root/etc/") + "\n")
    )
    assert "configuration OK" in programs.run(BIN / "fumi-core", "--config", path, "--check")


def test_one_host_becomes_two(host: Callable[[str], str], programs: Programs, certificate: CertificateFiles) -> None:
    host(PROGRAMS + INSTALL)
    lineage(programs, certificate)
    host(START)
    port = free_port()

    def here(text: str) -> str:
        return text.replace("10.0.0.1", "127.0.0.1").replace("10.0.0.2:2525", f"127.0.0.1:{port}")

    assert host(here(CORE_HOST)) == "systemctl daemon-reload\nsystemctl enable --now fumi-core\n"
    units = programs.directory / "root" / "etc" / "systemd" / "system"
    service = units / "fumi-core.service"
    service.write_text(service.read_text().replace("/opt/fumi/bin", str(BIN)))
    said = programs.run("systemd-analyze", "verify", "--man=no", service, units / "fumi-core.socket")
    assert [line for line in said.splitlines() if "fumi" in line or "network.conf" in line] == []
    # systemd-analyze does read what is dropped in.
    (network,) = (units / "fumi-core.socket.d").iterdir()
    text = network.read_text()
    network.write_text(text.replace("FreeBind", "FreeeBind"))
    assert "FreeeBind" in programs.run("systemd-analyze", "verify", "--man=no", service, units / "fumi-core.socket")
    (listen,) = re.findall("^ListenStream=(.+)", text, re.MULTILINE)
    core: list[str | Path] = ["--config", settings(programs), "--listen", listen]
    programs.start(BIN / "fumi-core", *core, port=port, log="core.log")
    said = host(here(EDGE_HOST))
    assert said.splitlines() == [
        "configuration OK",
        "systemctl restart fumi-edge",
        "systemctl disable --now fumi-core.socket fumi-core",
    ]
    assert f'backend = ["127.0.0.1:{port}"]' in (units.parents[1] / "fumi" / "fumi.toml").read_text()


def test_the_journalctl_commands_and_fields_are_valid(host: Callable[[str], str], programs: Programs) -> None:
    assert host(JOURNAL).count("journalctl -u ") == len(JOURNAL.splitlines())
    for flag in set(re.findall(r" (--?[a-z]+)", JOURNAL)):
        assert re.search(rf"(?<!\S){flag}\b", programs.run("journalctl", "--help")), flag
    assert host(RETENTION) == "systemctl restart systemd-journald\n"
    (file,) = (programs.directory / "root" / "etc" / "systemd" / "journald.conf.d").iterdir()
    for name in re.findall(r"^(\w+)=", file.read_text(), re.MULTILINE):
        assert f"{name}=" in Path("/etc/systemd/journald.conf").read_text()
    (span,) = re.findall("MaxRetentionSec=(.*)", file.read_text())
    programs.run("systemd-analyze", "timespan", span)


def test_the_composition_finds_its_names_and_its_certificate(
    host: Callable[[str], str], programs: Programs, certificate: CertificateFiles
) -> None:
    live = lineage(programs, certificate)
    assert host(COMPOSE) == "docker compose -f ops/docker/compose.yml up --build --wait\n"
    docker = programs.directory / "ops" / "docker"
    needed = re.findall(r"\$\{(\w+):\?", (docker / "compose.yml").read_text())
    assert set(re.findall(r"^(\w+)=\S+$", (docker / ".env").read_text(), re.MULTILINE)) == set(needed)
    (file,) = (docker / "certs").iterdir()
    assert file.read_bytes() == (live / "fullchain.pem").read_bytes() + (live / "privkey.pem").read_bytes()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (docker / "certs", file)] == [0o700, 0o600]
    if os.getuid() == 0:
        assert {path.stat().st_uid for path in (docker / "certs", file)} == {10001}
    compose = "docker compose -f ops/docker/compose.yml"
    host(COMPOSE_CERT)
    assert file.read_text() == (programs.directory / "dev/mx.example.org.pem").read_text()
    assert host(COMPOSE_UPGRADE).splitlines() == [f"{compose} up --build --wait", f"{compose} kill --signal HUP prometheus"]


def test_the_job_is_named_as_the_alerts_know_it(programs: Programs) -> None:
    (relabelling,) = (text for text in YAML if "relabel_configs" in text)
    # Debian's Prometheus knows no Kubernetes; relabelling is the same everywhere.
    config = f"scrape_configs:\n- job_name: pods\n{textwrap.indent(relabelling, '  ')}"
    (programs.directory / "prometheus.yml").write_text(config)
    assert "SUCCESS" in programs.run("promtool", "check", "config", programs.directory / "prometheus.yml")
    names = re.findall(r"app.kubernetes.io/name: (.+?)}", (ROOT / "ops" / "kubernetes" / "manifests" / "edge.yaml").read_text())
    known = re.findall(r'job=~"([^"]+)"', RULES)
    assert all(re.fullmatch(pattern, names[0]) for pattern in [*known, re.findall("regex: (.*)", relabelling)[0]])


Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """What systemd holds."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock


@pytest.fixture
def start_edge(programs: Programs, listener: socket.socket, certificate: CertificateFiles) -> Iterator[Start]:
    """Starts edges on that socket, as an upgrade does: each ready when this returns."""
    core = free_port()
    programs.start(BIN / "fumi-core", "--listen", f"127.0.0.1:{core}", port=core, log="core.log")
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        metrics = free_port()
        flags = [f"--listen=fd:{listener.fileno()}", f"--cert={certificate[0]}", f"--key={certificate[1]}"]
        flags += [f"--backend=127.0.0.1:{core}", f"--metrics=127.0.0.1:{metrics}"]
        log = programs.directory / f"edge{len(started)}.log"
        with log.open("wb") as output:
            edge = subprocess.Popen([BIN / "fumi-edge", *flags], stderr=output, pass_fds=[listener.fileno()])
        started.append(edge)
        until(lambda: "metrics address=" in log.read_text() or edge.poll() is not None, "the start of an edge")
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


def test_a_restart_loses_neither_open_nor_new_connections(
    start_edge: Start, listener: socket.socket, certificate: CertificateFiles
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
    start_edge: Start, listener: socket.socket, certificate: CertificateFiles
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
