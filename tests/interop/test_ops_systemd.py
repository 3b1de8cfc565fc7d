"""ops/systemd: units that systemd finds nothing wrong with, and that start the programs as it would."""

from __future__ import annotations

import os
import re
import shlex
import signal
import smtplib
import ssl
import stat
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import CertificateFiles, self_signed
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

SYSTEMD = Path(__file__).parents[2] / "ops" / "systemd"
SERVICES = ["fumi-core.service", "fumi-edge.service"]
HOOK = SYSTEMD / "certbot-deploy-hook"


class Unit:
    """A unit file: settings that stand there several times are added up, as systemd does."""

    def __init__(self, path: Path) -> None:
        parser = ConfigParser(strict=False, interpolation=None, dict_type=Repeated, delimiters=("=",), comment_prefixes=("#",))
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read(path)
        self.settings = {f"{section}.{name}": value for section in parser.sections() for name, value in parser[section].items()}

    def __getitem__(self, name: str) -> str:
        return self.settings.get(name, "")


class Repeated(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, list) and name in self:
            value = [*self[name], *value]
        super().__setitem__(name, value)


UNITS = {path.name: Unit(path) for pattern in ("*.service", "*.socket") for path in SYSTEMD.glob(pattern)}
EDGE_SOCKETS = sorted(name for name in UNITS if name.startswith("fumi-edge-"))


@pytest.fixture
def directory(programs: Programs) -> Path:
    """The units as they would be installed, but with the programs from here."""
    for path in SYSTEMD.iterdir():
        text = path.read_text().replace("/opt/fumi/bin", str(BIN))
        (programs.directory / path.name).write_text(text)
    return Path(programs.directory)


def test_systemd_finds_nothing_wrong_with_the_units(directory: Path, programs: Programs) -> None:
    said = programs.run("systemd-analyze", "verify", "--man=no", *(directory / name for name in UNITS))
    assert [line for line in said.splitlines() if "fumi" in line] == []


def test_systemd_would_have_complained(directory: Path, programs: Programs) -> None:
    unit = directory / "fumi-core.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSeconds="))
    assert "fumi-core.service" in programs.run("systemd-analyze", "verify", "--man=no", unit)


@pytest.mark.parametrize("name", SERVICES)
def test_exposure_is_below_two(name: str, directory: Path, programs: Programs) -> None:
    said = programs.run("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", directory / name)
    assert float(re.search(r"exposure level for \S+ ([0-9.]+)", said)[1]) < 2.0  # type: ignore[index]


def test_sysusers_makes_the_users_that_the_units_run_as(programs: Programs) -> None:
    root = programs.directory / "root"
    (root / "etc").mkdir(parents=True)
    programs.run("systemd-sysusers", f"--root={root}", SYSTEMD / "fumi.sysusers")
    users = {line.split(":")[0] for line in (root / "etc" / "passwd").read_text().splitlines()}
    wanted = {UNITS[name]["Service.User"] for name in SERVICES} | {UNITS["fumi-core.socket"]["Socket.SocketUser"]}
    assert users >= wanted == {"fumi-core", "fumi-edge"}


def test_each_service_has_its_sockets_and_listens_on_them(parse_flags: Callable[[list[str]], dict[str, Any]]) -> None:
    edge = UNITS["fumi-edge.service"]
    for setting in ("Unit.Requires", "Service.Sockets", "Install.Also"):
        assert edge[setting].split() == EDGE_SOCKETS, setting
    assert set(EDGE_SOCKETS) <= set(edge["Unit.After"].split())
    assert {UNITS[name]["Socket.Service"] for name in EDGE_SOCKETS} == {"fumi-edge.service"}
    for service, sockets in (("fumi-edge.service", EDGE_SOCKETS), ("fumi-core.service", ["fumi-core.socket"])):
        settings = parse_flags(command(service, SYSTEMD))
        named = [str(address) for address in (*settings["listen"], *settings.get("starttls_listen", ()))]
        assert sorted(named) == sorted(f"fd:{UNITS[name]['Socket.FileDescriptorName']}" for name in sockets)
        assert int(UNITS[service]["Service.TimeoutStopSec"]) > settings["drain_timeout"]
    assert f"unix:{UNITS['fumi-core.socket']['Socket.ListenStream']}" in (SYSTEMD / "fumi.toml").read_text()


@pytest.mark.parametrize("directory", [SYSTEMD, SYSTEMD.parent / "mail-host"])
@pytest.mark.parametrize("name", ["fumi-core", "fumi-edge"])
def test_a_reload_ends_with_a_check_of_what_is_started(name: str, directory: Path) -> None:
    text = next(path for path in directory.glob(f"{name}.*") if path.suffix in (".service", ".conf")).read_text()
    (start,) = re.findall("^ExecStart=(.+)$", text, re.MULTILINE)
    *_, signals, check = re.findall("^ExecReload=(.*)$", text, re.MULTILINE)
    assert (signals, check) == ('sh -c "kill -HUP $MAINPID"', f"{start} --check")


@pytest.mark.parametrize("directory", [SYSTEMD, SYSTEMD.parent / "mail-host"])
def test_the_units_name_pages_of_ours(directory: Path) -> None:
    pages = [
        page
        for path in directory.glob("*.s[eo]*")
        for page in re.findall(r"^Documentation=(.+)$", path.read_text(), re.MULTILINE)
    ]
    assert pages
    for page in " ".join(pages).split():
        assert (SYSTEMD.parents[1] / page.removeprefix("file:/opt/fumi/")).is_file(), page


def command(service: str, directory: Path) -> list[str]:
    """ExecStart, with the settings in this directory."""
    return shlex.split(UNITS[service]["Service.ExecStart"].replace("/etc/fumi/fumi.toml", f"{directory}/fumi.toml"))


class Service:
    """A unit that runs: started when somebody connects, by systemd's own systemd-socket-activate."""

    def __init__(self, programs: Programs, service: str, sockets: dict[str, str]) -> None:
        """``sockets``: by FileDescriptorName, what to listen on."""
        words = command(service, programs.directory)
        words[0] = str(BIN / Path(words[0]).name)
        listen = [word for address in sockets.values() for word in ("-l", address)]
        log = service.replace(".service", ".log")
        self.log: Path = programs.directory / log
        self.process = programs.start("systemd-socket-activate", *listen, f"--fdname={':'.join(sockets)}", *words, log=log)
        until(lambda: f"Listening on {[*sockets.values()][-1]}" in self.log.read_text(), f"the sockets of {service}")


@pytest.fixture
def running(programs: Programs, directory: Path, certificate: CertificateFiles) -> tuple[dict[str, int], Service, Service]:
    """Both units on free ports, each known by its FileDescriptorName; the certificate was put there by the hook."""
    (directory / "certs").mkdir()
    deploy(programs, *certificate, stop=False)
    text = (directory / "fumi.toml").read_text()
    metrics = {port: str(free_port()) for port in ("9525", "9465")}
    for before, after in {"/var/lib/fumi-core": f"{directory}/state", "/etc/fumi/certs": f"{directory}/certs",
                          "/run/": f"{directory}/", **metrics}.items():  # fmt: skip
        text = text.replace(before, after)
    (directory / "state").mkdir()
    (directory / "fumi.toml").write_text(text)
    core = Service(programs, "fumi-core.service", {"core": f"{directory}/fumi-core.socket"})
    ports = {UNITS[name]["Socket.FileDescriptorName"]: free_port() for name in EDGE_SOCKETS}
    edge = Service(programs, "fumi-edge.service", {name: f"127.0.0.1:{port}" for name, port in ports.items()})
    return ports, core, edge


def deploy(programs: Programs, cert: Path, key: Path, reload: int | None = None, stop: bool = True) -> str:
    """Renew, as certbot would, with a systemctl that does what it does to a unit of this process."""
    lineage = programs.directory / "live" / "localhost"
    lineage.mkdir(parents=True, exist_ok=True)
    (lineage / "fullchain.pem").write_bytes(cert.read_bytes())
    (lineage / "privkey.pem").write_bytes(key.read_bytes())
    tools = programs.directory / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "systemctl").write_text(f'#!/bin/sh\necho "systemctl $@"\n{f"kill -HUP {reload}" if reload else ""}\n')
    (tools / "systemctl").chmod(0o755)
    environment = {"RENEWED_LINEAGE": str(lineage), "FUMI_CERTS": str(programs.directory / "certs")}
    environment |= {"FUMI_USER": str(os.getuid()), "PATH": f"{tools}:{os.environ['PATH']}"}
    return programs.run(HOOK, environment=environment)


def test_every_socket_accepts_mail(
    running: tuple[dict[str, int], Service, Service], certificate: CertificateFiles, directory: Path, programs: Programs
) -> None:
    ports, core, edge = running
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with smtplib.SMTP_SSL("127.0.0.1", ports["submissions"], context=context) as smtp:
        smtp.sendmail("a@example.com", ["b@example.org"], "hi")
    for name in ("smtp", "submission"):
        with smtplib.SMTP("127.0.0.1", ports[name]) as smtp:
            smtp.starttls(context=context)
            smtp.sendmail("a@example.com", ["b@example.org"], "hi")
    assert len(os.listdir(directory / "state" / "inbox" / "new")) == 3
    # ExecReload= and the stop: one that is asked to reload goes on, and one that is told to stop has nothing to complain of.
    for service in (edge, core):
        service.process.send_signal(signal.SIGHUP)
    with smtplib.SMTP_SSL("127.0.0.1", ports["submissions"], context=context) as smtp:
        smtp.sendmail("a@example.com", ["b@example.org"], "hi")
    assert [programs.stop(service.process) for service in (edge, core)] == [0, 0]


def test_the_hook_has_a_renewed_certificate_taken_into_service(
    running: tuple[dict[str, int], Service, Service], certificate: CertificateFiles, directory: Path, programs: Programs
) -> None:
    ports, _, edge = running
    address = ("127.0.0.1", ports["submissions"])
    assert ssl.get_server_certificate(address) == certificate[0].read_text()
    new = self_signed(directory, "localhost")
    said = deploy(programs, *new, reload=edge.process.pid)
    assert said == "systemctl try-reload-or-restart fumi-edge.service\n"
    until(lambda: ssl.get_server_certificate(address) == new[0].read_text(), "the new certificate")
    (file,) = (directory / "certs").iterdir()
    assert (file.name, stat.S_IMODE(file.stat().st_mode)) == ("localhost.pem", 0o600)
    assert file.read_bytes() == new[0].read_bytes() + new[1].read_bytes()


def test_without_its_variable_the_hook_names_it(programs: Programs) -> None:
    assert "RENEWED_LINEAGE" in programs.run("env", "-u", "RENEWED_LINEAGE", HOOK, status=2)
