"""A machine that a real systemd boots: a new Debian in a container of systemd-nspawn, in the network of a host on a switch.

debootstrap makes the Debian once. What a machine writes is in memory, and gone with it. What pip installs comes from a directory,
for there is no way to PyPI from there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import smtplib
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench import environment
from tests.support import starter
from tests.support.certificates import CertificateFiles
from tests.support.hosts import Host
from tests.support.inside import Client
from tests.support.programs import Maildir
from tests.support.starter import ROOT
from tests.support.waiting import until

NAME, DOMAIN = "mx.example.org", "example.org"
PACKAGES = ("systemd-sysv", "dbus", "iproute2", "python3-venv")
"""What the machine has besides the smallest Debian; Fumi needs the last one."""
DEBIANS = {"12": "bookworm", "13": "trixie"}
CHECKOUT = Path("/root/fumi")
BOOT = r"""
set -eu
base=$1 debian=$2 wheels=$3 network=$4 name=$5
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=$debian,upperdir=$base/upper,workdir=$base/work" "$base/root"
# cgroups of version 2 and no others, whatever is mounted elsewhere: systemd 257 knows no others.
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$name"
echo $$ >"/sys/fs/cgroup/$name/cgroup.procs"
exec systemd-nspawn --quiet --register=no --keep-unit --boot --console=pipe --directory="$base/root" --machine="${name%-*}" \
    --network-namespace-path="$network" --resolv-conf=off --bind-ro="$wheels:/wheels"
"""
PIP = "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n"
POWER_OFF = signal.SIGRTMIN + 4


def debian(version: str, *packages: str) -> Path:
    """The directory of a Debian with these packages, made if it is not there."""
    if not shutil.which("debootstrap") or not shutil.which("systemd-nspawn"):
        environment.run("apt-get", "update")
        environment.run("apt-get", "install", "--yes", "--no-install-recommends", "debootstrap", "systemd-container")
    directory = environment.INSTALLED / "-".join([f"debian-{version}", *packages])
    if not directory.exists():
        environment.INSTALLED.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=environment.INSTALLED) as parts:
            made = Path(parts) / "root"
            include = ",".join([*PACKAGES, *packages])
            # With mounts of its own: what it mounts there is gone when it ends, whatever happens, before files are removed.
            command = ("unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={include}")
            environment.run(*command, DEBIANS[version], str(made))
            made.rename(directory)
    return directory


def wheels() -> Path:
    """A directory with what pip installs for Fumi."""
    directory = environment.INSTALLED / "wheels"
    if not directory.exists():
        with tempfile.TemporaryDirectory(dir=environment.INSTALLED) as parts:
            made = Path(parts) / "wheels"
            needed = ("setuptools>=77", "click>=8.1", "prometheus-client>=0.20")
            environment.run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(made), *needed)
            made.rename(directory)
    return directory


class SystemdMachine:
    """A booted Debian with a checkout of Fumi; ``close()`` powers it off."""

    def __init__(self, host: Host, root: Path, directory: Path) -> None:
        """``directory`` is for its files here, while it runs."""
        self.host = host
        self._log = directory / f"{host.name}.log"
        self._cgroup = f"{host.name}-{os.getpid()}"
        base = directory / host.name
        base.mkdir()
        words: list[str | Path] = [base, root, wheels(), f"/proc/{host.pid}/ns/net", self._cgroup]
        with self._log.open("wb") as log:
            # It powers off when the tests are killed.
            command = ["setpriv", "--pdeathsig=TERM", "unshare", "--mount", "sh", "-c", BOOT, "sh", *words]
            self._nspawn = starter.start(*command, stdout=log, stderr=log)
        try:
            until(lambda: self._leader() or self._nspawn.poll() is not None, "a container")
            assert self._nspawn.poll() is None, self._log.read_text()
            until(lambda: self._state() in ("running", "degraded"), "the boot")
            assert self._state() == "running", self.run("systemctl --failed --no-pager")
            self._copy_checkout()
        except BaseException:
            self.close()
            raise

    def _leader(self) -> int | None:
        """The process that is systemd there."""
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def _state(self) -> str:
        return self.outcome("systemctl is-system-running", directory="/").stdout.strip()

    def _copy_checkout(self) -> None:
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, names):
            if not name.startswith("tests/"):
                target = self.path(CHECKOUT / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        self.path("/etc/pip.conf").write_text(PIP)

    def path(self, inside: str | Path) -> Path:
        """Where a file of the machine is."""
        return Path(f"/proc/{self._leader()}/root{inside}")

    def outcome(self, text: str, given: str = "", directory: str | Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
        """How the commands ended that root ran there, in this directory."""
        environment = ["env", "-i", f"--chdir={directory}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        inside = ["nsenter", f"--target={self._leader()}", "--all", *environment]
        return starter.finished(*inside, "sh", "-euc", text, given=given, timeout=900)

    def run(self, text: str, given: str = "", directory: str | Path = CHECKOUT) -> str:
        """What the commands print; they are to succeed."""
        done = self.outcome(text, given, directory)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}{self.journal('--lines=30')}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run(f"systemctl show --value --property {name} {unit}").strip()

    def journal(self, *words: str) -> str:
        """The messages of the journal, without times and names."""
        return self.outcome(f"journalctl --no-pager --output cat {' '.join(words)}", directory="/").stdout

    def put_certificate(self, files: CertificateFiles) -> None:
        """Put the certificate where certbot does."""
        directory = self.path(f"/etc/letsencrypt/live/{NAME}")
        directory.mkdir(parents=True, exist_ok=True)
        for source, name in zip(files, ("fullchain.pem", "privkey.pem"), strict=True):
            (directory / name).write_bytes(source.read_bytes())

    def smtp(self, client: Host, certificate: Path, port: int = 25) -> smtplib.SMTP:
        """A client on another host, after STARTTLS on port 25 or 587, or on port 465."""
        trust = ssl.create_default_context(cafile=str(certificate))
        smtp = Client(client.pid, (self.host.address, port), trust, NAME)
        if port != 465:
            smtp.starttls(context=trust)
        return smtp

    @contextlib.contextmanager
    def setting(self, section: str, line: str) -> Iterator[None]:
        """With one more line in the settings, which are reloaded without it in the end."""
        settings = self.path("/etc/fumi/fumi.toml")
        before = settings.read_text()
        settings.write_text(before.replace(f"[{section}]\n", f"[{section}]\n{line}\n"))
        try:
            yield
        finally:
            settings.write_text(before)
        self.run(f"systemctl reload fumi-{section}")

    @property
    def inbox(self) -> Maildir:
        return Maildir(self.path("/var/lib/fumi-core/inbox"))

    def close(self) -> None:
        """Power off; a machine that does not is killed."""
        leader = self._leader() if self._nspawn.poll() is None else None
        if leader is not None:
            os.kill(leader, POWER_OFF)
        try:
            self._nspawn.wait(90)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait(60)
        finally:
            for group in _cgroups(self._cgroup):
                (group / "cgroup.kill").write_text("1")
                for each in sorted(group.rglob("*/"), reverse=True):
                    each.rmdir()
                group.rmdir()


def _cgroups(name: str) -> Iterator[Path]:
    """The cgroup of this name, at the top of the tree of version 2."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup2" and (Path(mount) / name).is_dir():
            yield Path(mount) / name
            return
