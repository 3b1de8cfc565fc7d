"""Debian's Docker with Compose v2, and its podman with podman-compose, each in namespaces of its own, on a host on a switch.

debootstrap makes their Debian once, and the images that FROM names, with what pip and apt-get install there: nothing is pulled.
What an engine writes into its Debian is in memory, and gone with it; images, containers and volumes are in a directory.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.bench import environment
from tests.support import starter
from tests.support.certificates import CertificateFiles
from tests.support.hosts import Host
from tests.support.programs import Maildir
from tests.support.readme import ROOT, sections
from tests.support.waiting import until

NAME = "mx.example.org"
DEBIAN, OLD_DEBIAN = "trixie", "bookworm"
ENGINES = (
    "ca-certificates", "iproute2", "prometheus",
    "docker.io", "docker-cli", "docker-compose", "docker-buildx", "iptables",
    "podman", "podman-compose", "crun", "netavark", "aardvark-dns", "nftables",
)  # fmt: skip
PYTHON = ("python3", "python3-venv", "python-is-python3")
MAIL_HOST = ("ca-certificates", "rspamd", "dovecot-imapd", "postfix")
"""What apt-get installs in the images of the mail host."""
BOOT = r"""
set -eu
base=$1 debian=$2 files=$3 data=$4 store=$5
shift 5
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=$debian,upperdir=$base/upper,workdir=$base/work" "$base/root"
cp -r "$files/." "$base/root"
cd "$base/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
# cgroups of version 2 and no others, whatever is mounted elsewhere.
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p ".$store" .old
mount --bind "$data" ".$store"
pivot_root . .old
umount -l /.old
exec chroot . "$@"
"""
PIP = "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n"
PROMETHEUS = """
FROM python:3.13-slim
COPY prometheus /bin/prometheus
RUN install -d -o nobody -g nogroup /prometheus
USER nobody
ENTRYPOINT ["/bin/prometheus"]
"""
"""As much of that image as matters: what it starts, and as whom."""
(PROMETHEUS_IMAGE,) = re.findall(r"\$\{PROMETHEUS_IMAGE:-(.*)\}", (ROOT / "ops/docker/compose.yml").read_text())
CONTAINERS = next(each.text for each in sections((ROOT / "ops/README.md").read_text()) if each.title == "Containers")
START, _, TRY, UPGRADE = re.findall(r"^```sh\n(.*?)^```", CONTAINERS, re.MULTILINE | re.DOTALL)[:4]
COMPOSE = "docker compose -f ops/docker/compose.yml"
_ANY_COMPOSE = re.compile(r"docker compose -f ops/docker/([\w-]+\.yml)")
(DAEMON,) = re.findall(r"`(\{\"experimental\".*\})`", CONTAINERS)
"""What the page has a Docker that is older than 27 be told."""
(PODMAN_COMPOSE,) = re.findall(r"`(podman-compose [^`]*)` takes", CONTAINERS)
"""What it has podman's users run in place of COMPOSE."""
((PODMAN_UP, UP),) = re.findall(r"`(up --build [^`]*)` of `(up --build [^`]*)`", CONTAINERS)


@dataclass(frozen=True)
class Composition:
    """A project of ops/docker, and what adds the images that it needs besides Python's and those that it builds."""

    project: str
    add_images: Callable[[ContainerEngine], None]


def debian(name: str, packages: tuple[str, ...], add: Callable[[Path], None] = lambda made: None, release: str = DEBIAN) -> Path:
    """The directory of a Debian with these packages, made if it is not there; ``add`` is called with the new one."""
    directory = environment.INSTALLED / name
    if not directory.exists():
        if not shutil.which("debootstrap"):
            environment.run("apt-get", "update")
            environment.run("apt-get", "install", "--yes", "--no-install-recommends", "debootstrap")
        environment.INSTALLED.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=environment.INSTALLED) as parts:
            made = Path(parts) / "root"
            # What debootstrap mounts is gone with its mount namespace.
            words = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", release, str(made)]
            environment.run("unshare", "--mount", "--pid", "--fork", "--kill-child", *words)
            for package in (made / "var/cache/apt/archives").glob("*.deb"):
                package.unlink()
            add(made)
            made.rename(directory)
    return directory


def _add_wheels(made: Path) -> None:
    """What pip installs for Fumi."""
    needed = ("setuptools>=77", "click>=8.1", "prometheus-client>=0.20")
    environment.run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(made / "wheels"), *needed)
    (made / "etc/pip.conf").write_text(PIP)


def _add_packages(made: Path) -> None:
    """What apt-get installs in the mail host's images, and what has no package's program started there, as in Debian's image."""
    with tempfile.TemporaryDirectory(dir=environment.INSTALLED) as parts:
        words = ["--variant=minbase", "--download-only", f"--include={','.join(MAIL_HOST)}", OLD_DEBIAN, parts]
        environment.run("unshare", "--mount", "--pid", "--fork", "--kill-child", "debootstrap", *words)
        (made / "packages").mkdir()
        for package in (Path(parts) / "var/cache/apt/archives").glob("*.deb"):
            shutil.copy(package, made / "packages")
    with (made / "packages/Packages").open("w") as index:
        for package in (made / "packages").glob("*.deb"):
            data = package.read_bytes()
            facts = subprocess.run(["dpkg-deb", "--field", package], check=True, capture_output=True, text=True).stdout
            print(f"{facts}Filename: ./{package.name}\nSize: {len(data)}\nSHA256: {sha256(data).hexdigest()}\n", file=index)
    (made / "etc/apt/sources.list").write_text("deb [trusted=yes] file:/packages ./\n")
    (made / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (made / "usr/sbin/policy-rc.d").chmod(0o755)


class ContainerEngine:
    """An engine with a checkout of Fumi in /root/fumi and a certificate where certbot has it; ``close()`` ends all of it."""

    program: str
    store: str
    daemon: tuple[str, ...]
    compose: str
    """What replaces _ANY_COMPOSE."""
    prometheus_image = PROMETHEUS_IMAGE
    up = UP

    def __init__(self, host: Host, directory: Path, certificate: CertificateFiles, composition: Composition) -> None:
        """``directory`` is for its files here, while it runs."""
        self.host = host
        self.composition = composition
        self._data = directory / "data"
        self._log = directory / "engine.log"
        base, files = directory / "base", directory / "files"
        for made in (self._data, base, files):
            made.mkdir()
        self._limit = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        self._write(files, certificate)
        words: list[str | Path] = [base, debian("debian-engines", ENGINES), files, self._data, self.store, *self.daemon]
        command = host.command("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", BOOT, "sh", *words)
        with self._log.open("wb") as log:
            self._process = starter.start(*command, stdout=log, stderr=log)
        try:
            until(lambda: self.ready() or self._process.poll() is not None, "the engine")
            assert self._process.poll() is None, self._log.read_text()
            self._import_images()
        except BaseException:
            self.close()
            raise

    def _write(self, files: Path, certificate: CertificateFiles) -> None:
        """The files that it finds in its Debian. Where the hard limit is lower, it cannot give containers more descriptors."""
        listed = ["git", "ls-files", "-z", ":!tests"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]:
            target = files / "root/fumi" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        ulimits = {"ulimits": {"nofile": {"soft": self._limit, "hard": self._limit}}}
        (files / "root/limits.yml").write_text(json.dumps({"services": {"core": ulimits, "edge": ulimits}}))
        for name, text in {
            # podman wants one; containers find each other without it.
            "etc/resolv.conf": "nameserver 192.0.2.1\n",
            "etc/docker/daemon.json": DAEMON,
            "etc/containers/containers.conf": (
                f'[containers]\ndefault_ulimits = ["nofile={self._limit}:{self._limit}", "nproc=4096:4096"]\npids_limit = 0\n'
                '[engine]\ncgroup_manager = "cgroupfs"\n'
            ),
            f"etc/letsencrypt/live/{NAME}/fullchain.pem": certificate[0].read_text(),
            f"etc/letsencrypt/live/{NAME}/privkey.pem": certificate[1].read_text(),
        }.items():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_text(text)

    def _import_images(self) -> None:
        self.import_image("python:3.13-slim", debian("debian-python", PYTHON, _add_wheels))
        self.composition.add_images(self)

    def import_image(self, name: str, root: Path) -> None:
        """Have an image of this name, with the files of this Debian."""
        words = ["tar", "--create", "--directory", str(root), "--exclude=./dev/*", "."]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as tar:
            subprocess.run(self._inside(f"{self.program} import - {name}"), stdin=tar.stdout, check=True, capture_output=True)

    def _first(self) -> int | None:
        """The first process in its namespaces, in which there is the Debian by now."""
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
                if (Path(f"/proc/{child}/comm").read_text().strip()) == self.daemon[0]:
                    return int(child)
        return None

    def ready(self) -> bool:
        return self._first() is not None and self.outcome(f"{self.program} info").returncode == 0

    def path(self, inside: str) -> Path:
        """Where a file of its Debian is."""
        return Path(f"/proc/{self._first()}/root{inside}")

    def _inside(self, text: str) -> list[str]:
        environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        words = ["nsenter", f"--target={self._first()}", "--mount", "--net", "--pid", "env", "--ignore-environment", *environment]
        return [*words, "sh", "-euc", f"cd /root/fumi; {text}"]

    def command(self, text: str) -> list[str]:
        """The words that run commands of the page there, as root in the checkout."""
        return self._inside(_ANY_COMPOSE.sub(self.compose, text).replace(UP, self.up))

    def outcome(self, text: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(text), input=given, capture_output=True, text=True, timeout=600, check=False)

    def run(self, text: str, given: str = "") -> str:
        """What commands print that must succeed."""
        done = self.outcome(text, given)
        assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}{done.stderr[-4000:]}\n{self._log.read_text()[-2000:]}"
        return done.stdout

    def log(self, service: str) -> str:
        """All that a service has written since its container was made."""
        return self.run(f"{self.program} logs {self.container(service)} 2>&1")

    def inspect(self, service: str, what: str) -> str:
        """A value that the engine knows of a service's container."""
        return self.run(f"{self.program} inspect --format '{{{{{what}}}}}' {self.container(service)}").strip()

    def container(self, service: str) -> str:
        raise NotImplementedError

    def volume(self, name: str) -> Path:
        """Where the files of a volume of the composition are."""
        (volumes,) = self._data.glob("volumes")
        return volumes / f"{self.composition.project}_{name}/_data"

    @property
    def inbox(self) -> Maildir:
        """The Maildir of compose.yml."""
        return Maildir(self.volume("mail") / "inbox")

    def close(self) -> None:
        if self._first():
            self.outcome(f"{self.program} rm --force $({self.program} ps --all --quiet)")
        # The first process of a namespace ends with all others in it.
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._data)


class Docker(ContainerEngine):
    """The Docker engine, with Compose v2."""

    program = "docker"
    store = "/var/lib/docker"
    daemon = ("dockerd", "--storage-driver=overlay2")
    compose = r"\g<0> -f /root/limits.yml"

    def container(self, service: str) -> str:
        return f"{self.composition.project}-{service}-1"


class Podman(ContainerEngine):
    """podman, which has no daemon."""

    program = "podman"
    store = "/var/lib/containers/storage"
    daemon = ("sleep", "infinity")
    compose = f"{PODMAN_COMPOSE} -f /root/limits.yml"
    up = PODMAN_UP
    prometheus_image = f"registry.example.net/{PROMETHEUS_IMAGE}"

    def container(self, service: str) -> str:
        return f"{self.composition.project}_{service}_1"


def _add_prometheus(engine: ContainerEngine) -> None:
    engine.run("mkdir /tmp/prometheus; cp /usr/bin/prometheus /tmp/prometheus; cat >/tmp/prometheus/Dockerfile", PROMETHEUS)
    engine.run(f"{engine.program} build --tag {engine.prometheus_image} /tmp/prometheus")


def _add_debian(engine: ContainerEngine) -> None:
    engine.import_image("debian:12-slim", debian("debian-packages", ("apt",), _add_packages, OLD_DEBIAN))


PAIR = Composition("fumi", _add_prometheus)
MAIL = Composition("fumi-mail-host", _add_debian)
