"""ops/docker/mail-host.yml as far as it can be known without an engine: what its images are built of runs on one machine."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.machine import DOMAIN, NAME, PASSWORD, Machine
from tests.interop.mail_host import CONTAINER_USER, CONTAINERS, CONTAINERS_START, PAGE
from tests.interop.test_mail_host import GTUBE, JOE, SENDER, letter
from tests.support.programs import Programs
from tests.support.readme import ROOT
from tests.support.starter import BIN

DOCKER = ROOT / "ops/docker"
CHECKOUT = "/opt/checkout"
_DOCKERFILE = (DOCKER / "mail-host/Dockerfile").read_text().replace("\\\n", "")
INSTRUCTIONS = [(name, text.strip()) for name, text in re.findall(r"^([A-Z]+) (.*)$", _DOCKERFILE, re.MULTILINE)]
STUB = """
case "$*" in
*" exec dovecot "*) while [ "$1" != dovecot ]; do shift; done && shift && exec "$@" ;;
*) echo docker "$@" ;;
esac
"""
"""There is one machine for all containers."""


@pytest.fixture
def compose(read_yaml: Callable[[Path], list[Any]]) -> dict[str, Any]:
    (document,) = read_yaml(DOCKER / "mail-host.yml")
    return dict(document)


class Containers(Machine):
    """One machine that has what all the images have, with the names and addresses that an engine would give them."""

    def __init__(self, programs: Programs, services: list[str], subnet: str) -> None:
        super().__init__(programs)
        self.stub("docker", text=STUB)
        shutil.copytree(ROOT / "ops", self.path(f"{CHECKOUT}/ops"), ignore=shutil.ignore_patterns("certs", "etc", ".env"))
        with self.path("/etc/hosts").open("a") as hosts:
            for number, service in enumerate(services, 2):
                address = f"{subnet.rpartition('.')[0]}.{number}"
                self.run(f"ip address add {address}/32 dev lo")
                hosts.write(f"{address} {service}\n")
        self.commands: dict[str, list[str]] = {}
        self.users: dict[str, str] = {}
        self._build()
        self.run("ln -s /srv/mail /var/lib/fumi; ln -s /opt/checkout/ops/docker/certs /srv/certs; mkdir -p /etc/fumi")
        self.lineage()
        self.started = self.run(CONTAINERS + CONTAINERS_START, directory=CHECKOUT)
        # The host has it, and no container.
        self.run("rm -r /etc/letsencrypt")
        self.run("cp ops/docker/mail-host/etc/* /etc/fumi", directory=CHECKOUT)
        self.run(CONTAINER_USER, f"{PASSWORD}\n" * 2, directory=CHECKOUT)

    def _build(self) -> None:
        """Do what the Dockerfile says, one image after another."""
        target = ""
        for name, text in INSTRUCTIONS:
            if name == "FROM":
                target = text.partition(" AS ")[2]
            elif name == "RUN":
                self.run(text)
            elif name == "COPY":
                source, destination = text.split()
                self.run(f"cp -rT {shlex.quote(f'{CHECKOUT}/ops/{source}')} {shlex.quote(destination)}")
            elif name == "USER":
                self.users[target] = text
            elif name == "CMD":
                self.commands[target] = json.loads(text)

    def serve(self, name: str, command: list[str], **environment: str) -> None:
        words = [f"{key}={value}" for key, value in environment.items()]
        self.start("runuser", "-u", self.users.get(name, "root"), "--", "env", *words, *command, log=name)


@pytest.fixture
def host(tmp_path: Path, compose: dict[str, Any]) -> Iterator[Containers]:
    services = compose["services"]
    with contextlib.closing(Programs(tmp_path)) as programs:
        host = Containers(programs, list(services), compose["networks"]["inside"]["ipam"]["config"][0]["subnet"])
        host.serve("rspamd", host.commands["rspamd"])
        certificate = services["dovecot"]["environment"]["CERTIFICATE"]
        host.serve("dovecot", host.commands["dovecot"], CERTIFICATE=re.sub(r"\$\{MAIL_HOST:[^}]*\}", NAME, certificate))
        in_place_of_postfix = ["--proxy-protocol=off", "--listen=postfix:10025", "--deliver=maildir:/srv/relayed"]
        host.serve("postfix", [str(BIN / "fumi-core"), *in_place_of_postfix])
        for port in (11332, 993, 10025):
            host.await_port(port)
        for name in ("core", "edge"):
            program, *flags = services[name]["command"]
            host.users[name] = "fumi-core"
            host.serve(name, [str(BIN / program), *flags])
        published = [each for name in services for each in services[name].get("ports", ())]
        host.ports = {int(outside): int(inside) for *_, outside, inside in (each.split(":") for each in published)}
        for port in host.ports.values():
            host.await_port(port)
        yield host


def test_the_contents_of_the_images_receive_filter_store_and_send_mail(host: Containers) -> None:
    assert host.started == "docker compose -f ops/docker/mail-host.yml up --build --wait\n"
    with host.smtp() as client:
        client.ehlo()
        client.mail(SENDER)
        assert client.rcpt(f"nobody@{DOMAIN}")[0] == 550
        client.rset()
        client.sendmail(SENDER, [JOE], letter("lunch"))
        client.mail(SENDER)
        client.rcpt(JOE)
        assert client.data(letter("spam", GTUBE))[0] == 554
    (text,) = host.read(JOE)
    assert b"\r\nX-Spamd-Result: " in text
    with host.submission(JOE) as client:
        client.sendmail(JOE, ["eve@elsewhere.example"], letter("out", sender=JOE))
        assert client.mail(f"ann@{DOMAIN}")[0] == 553
    assert len(host.maildir("/srv/relayed")) == 1
    (reload,) = re.findall(r"`(docker compose [^`]*reload)`", PAGE)
    host.run(reload, directory=CHECKOUT)


def test_everything_that_it_names_is_there(compose: dict[str, Any]) -> None:
    assert set(compose) == {"name", "x-logging", "x-fumi", "x-debian", "services", "networks", "volumes"}
    targets = {text.partition(" AS ")[2] for name, text in INSTRUCTIONS if name == "FROM"}
    for name, service in compose["services"].items():
        if name == "edge":  # The core's image, which it builds.
            assert (service["image"], service["pull_policy"]) == (compose["services"]["core"]["image"], "never")
        else:
            context = (DOCKER / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file(), name
            assert service["build"].get("target", "debian") in targets
        assert set(service["networks"]) == set(compose["networks"])
        assert "no-new-privileges:true" in service["security_opt"]
        assert set(service.get("depends_on", ())) <= set(compose["services"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            # The operator's own directories have a dot.
            assert source in ("./certs", "./mail-host/etc") if source.startswith(".") else source in compose["volumes"], volume
    ignored = (DOCKER / "mail-host/Dockerfile.dockerignore").read_text().splitlines()
    copied = [text.split()[0] for name, text in INSTRUCTIONS if name == "COPY"]
    assert all(any(source.startswith(line[1:]) for line in ignored if line.startswith("!")) for source in copied)


def test_the_settings_differ_from_those_of_one_host_in_addresses_alone() -> None:
    def settings(path: str) -> list[str]:
        lines = (ROOT / path).read_text().splitlines()
        return [line.partition(" = ")[0] for line in lines if not line.startswith(("#", "trusted-proxy"))]

    assert settings("ops/docker/mail-host/fumi.toml") == settings("ops/mail-host/fumi.toml")
