"""ops/docker, as far as it can be known without an engine: what is copied installs, what is run runs, what is named is there."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fumi_core.version import VERSION
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "ops" / "docker"
CONTAINERS = ROOT / "ops" / "prometheus" / "containers.yml"
INSTRUCTIONS = re.findall(r"^([A-Z]+) (.*)$", (DOCKER / "Dockerfile").read_text().replace("\\\n", ""), re.MULTILINE)
HEALTHCHECK = json.loads(next(text for name, text in INSTRUCTIONS if name == "HEALTHCHECK").partition("CMD")[2])
EXPOSED = {int(port) for name, text in INSTRUCTIONS if name == "EXPOSE" for port in text.split()}


@pytest.fixture
def compose(read_yaml: Callable[[Path], list[Any]]) -> dict[str, Any]:
    (document,) = read_yaml(DOCKER / "compose.yml")
    return dict(document)


def copied() -> list[str]:
    return [word for name, text in INSTRUCTIONS if name == "COPY" and "--from" not in text for word in text.split()[:-1]]


def test_what_is_copied_is_all_that_an_installation_needs(tmp_path: Path) -> None:
    allowed = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied()) == allowed
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    install = ["install", "--quiet", "--no-deps", "--target", str(tmp_path / "installed"), "."]
    subprocess.run([sys.executable, "-m", "pip", *install], cwd=tmp_path / "source", check=True, timeout=600)
    for program in ("fumi-core", "fumi-edge"):
        assert (tmp_path / "installed" / "bin" / program).exists()


def test_the_image_runs_unprivileged_and_declares_its_ports(compose: dict[str, Any]) -> None:
    assert [text for name, text in INSTRUCTIONS if name == "USER"] == ["10001:10001"]
    assert all(re.fullmatch(r"python:3\.\d+-slim(?: AS build)?", text) for name, text in INSTRUCTIONS if name == "FROM")
    flags = "\n".join(flag for name in ("core", "edge") for flag in compose["services"][name]["command"])
    used = {int(port) for port in re.findall(r"^--(?:listen|starttls-listen|metrics)=:(\d+)$", flags, re.MULTILINE)}
    assert used == EXPOSED
    assert all(port >= 1024 for port in EXPOSED)


def test_the_image_runs_either_program_and_takes_flags_alone_for_those_of_the_edge(programs: Programs) -> None:
    entrypoint, command = (
        json.loads(next(text for name, text in INSTRUCTIONS if name == each)) for each in ("ENTRYPOINT", "CMD")
    )
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    assert programs.run(*entrypoint, *command, environment=path).startswith("Usage: fumi-edge ")
    for arguments, program in (
        (["--version"], "edge"),
        (["fumi-edge", "--version"], "edge"),
        (["fumi-core", "--version"], "core"),
    ):
        assert programs.run(*entrypoint, *arguments, environment=path) == programs.run(BIN / f"fumi-{program}", "--version")
    assert "'a b' is not an address" in programs.run(*entrypoint, "fumi-core", "--listen", "a b", status=2, environment=path)


def test_the_labels_have_the_version(compose: dict[str, Any]) -> None:
    (labels,) = (text for name, text in INSTRUCTIONS if name == "LABEL")
    values = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', labels))
    assert values["version"] == VERSION
    assert values["title"] == compose["x-fumi"]["image"]
    assert f'license = "{values["licenses"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_health_check_connects_to_the_program(programs: Programs) -> None:
    metrics, listen = free_port(), free_port()
    words = [sys.executable, *HEALTHCHECK[1:]]
    assert HEALTHCHECK[0] == "python"
    health = {"HEALTH": f"127.0.0.1:{metrics}"}
    assert "refused" in programs.run(*words, status=1, environment=health)
    flags = ["--listen", f"127.0.0.1:{listen}", "--metrics", f"127.0.0.1:{metrics}", "--deliver", "discard:"]
    programs.start(BIN / "fumi-core", *flags, port=metrics)
    assert programs.run(*words, environment=health) == ""


@pytest.mark.parametrize("name", ["core", "edge"])
def test_each_service_has_flags_that_its_program_takes_and_fits_the_others(
    name: str, compose: dict[str, Any], parse_flags: Callable[[list[str]], dict[str, Any]]
) -> None:
    def flags(name: str) -> dict[str, Any]:
        # An engine puts in what ${NAME:?…} stands for, and starts nothing without it.
        command = compose["services"][name]["command"]
        return parse_flags([re.sub(r"\$\{(?:MAIL_HOST|DOMAIN):\?[^}]+\}", "example.org", word) for word in command])

    service, settings = compose["services"][name], flags(name)
    assert service["command"][0] == f"fumi-{name}"
    assert service["environment"]["HEALTH"] == f"127.0.0.1:{settings['metrics'].port}"
    assert int(service["stop_grace_period"].removesuffix("s")) > settings["drain_timeout"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    listeners = {address.port for address in (*settings["listen"], *settings.get("starttls_listen", ()))}
    page = f"127.0.0.1:{settings['metrics'].port}:{settings['metrics'].port}"
    assert page in service["ports"]
    assert {int(each.partition(":")[2]) for each in service["ports"] if each != page} == (listeners if name == "edge" else set())
    if name == "core":
        assert settings["trusted_proxy"] == tuple(each["subnet"] for each in compose["networks"]["inside"]["ipam"]["config"])
        assert settings["name"] == "example.org"
        assert settings["deliver"].startswith("maildir:/var/lib/fumi/")
        assert settings["domain"] == ("example.org",)
    else:
        (backend,) = settings["backend"]
        (core,) = flags("core")["listen"]
        assert (backend.host, backend.port) == ("core", core.port)
        # In an upgrade, Compose replaces at once what does not depend on something.
        assert "depends_on" not in service


@pytest.mark.parametrize("name", ["compose.yml", "mail-host.yml"])
def test_clients_keep_their_ipv6_addresses_and_logs_end(name: str, read_yaml: Callable[[Path], list[Any]]) -> None:
    (document,) = read_yaml(DOCKER / name)
    network = document["networks"]["inside"]
    versions = [ipaddress.ip_network(each["subnet"]).version for each in network["ipam"]["config"]]
    assert (network["enable_ipv6"], versions) == (True, [4, 6])
    for service in document["services"].values():
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}


def test_everything_that_the_composition_names_is_there(compose: dict[str, Any]) -> None:
    assert set(compose) == {"name", "x-logging", "x-fumi", "services", "networks", "volumes"}
    for name, service in compose["services"].items():
        known = {"image", "build", "restart", "read_only", "tmpfs", "cap_drop", "security_opt", "stop_grace_period", "ulimits"}
        known |= {"command", "environment", "volumes", "ports", "networks", "depends_on", "logging", "hostname", "pull_policy"}
        assert set(service) <= known, name
        assert set(service["networks"]) <= set(compose["networks"])
        if "build" in service:
            context = (DOCKER / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]) == DOCKER / "Dockerfile"
        elif name == "edge":  # The core's image, which it builds.
            assert (service["image"], service["pull_policy"]) == (compose["services"]["core"]["image"], "never")
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source == "./certs":
                continue  # the operator's own
            # A file that is replaced stays the old one in a container.
            assert (DOCKER / source).is_dir() if source.startswith(".") else source in compose["volumes"], volume


def test_prometheus_there_scrapes_the_services_by_their_names(compose: dict[str, Any]) -> None:
    prometheus = compose["services"]["prometheus"]
    assert f"--config.file=/etc/prometheus/{CONTAINERS.name}" in prometheus["command"]
    assert "../prometheus:/etc/prometheus:ro" in prometheus["volumes"]
    for name, port in re.findall(r'targets: \["(\w+):(\d+)"\]', CONTAINERS.read_text()):
        assert f"--metrics=:{port}" in compose["services"][name]["command"]
