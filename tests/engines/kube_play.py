"""podman, which plays manifests of Kubernetes on one host: in namespaces of its own, with an image of a Debian and Fumi."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench import environment
from tests.engines.systemd_machine import debian
from tests.support import starter
from tests.support.certificates import CertificateFiles
from tests.support.hosts import Namespace
from tests.support.starter import ROOT
from tests.support.waiting import until

PACKAGES = ("podman", "crun", "catatonit", "netavark", "iptables")
CORE, EDGE, OUTSIDE = "10.0.0.6", "10.0.0.7", "10.0.0.1"
APART = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
BOOT = r"""
set -eu
mount --make-rprivate /
# crun 1.8 does not know cgroups of both versions at once.
mountpoint -q /sys/fs/cgroup/unified && umount /sys/fs/cgroup/unified
mount --bind "$1/hosts" /etc/hosts
exec sleep infinity
"""
DOCKERFILE = """
FROM localhost/debian
COPY files /
COPY --chown=10001:10001 state /var/lib/fumi
"""
PROGRAM = '#!/bin/sh\nPYTHONPATH=/opt/fumi exec python3 -m {module} "$@"\n'


class KubePlay:
    """podman with the image ``fumi``; ``close()`` ends all that it has started."""

    def __init__(self, directory: Path, certificate: CertificateFiles) -> None:
        if not all(shutil.which(program) for program in ("podman", "crun", "catatonit", "iptables")):
            environment.run("apt-get", "update")
            environment.run("apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES)
        self._directory = directory
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{CORE} fumi-core\n{OUTSIDE} dovecot.mail.svc\n")
        (directory / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{directory}/networks"\n'
        )
        (directory / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/root"\nrunroot = "{directory}/run"\n'
        )
        self.network = Namespace()
        command = self.network.command(*APART, "sh", "-c", BOOT, "sh", directory)
        with (directory / "podman.log").open("wb") as log:
            # It ends when the tests are killed.
            self._holder = starter.start("setpriv", "--pdeathsig=KILL", *command, stdout=log, stderr=log)
        try:
            until(lambda: self._holder.poll() is not None or self._first() is not None, "the namespaces")
            self._import_image()
            self.run("network", "create", "--subnet", "10.0.0.0/24", "--disable-dns", "fumi")
            # podman 4.3 takes what is there as it is, not as base64.
            secret = {"tls.crt": certificate[0].read_text(), "tls.key": certificate[1].read_text()}
            self.run("secret", "create", "fumi-edge-tls", "-", given=json.dumps({"data": secret}).encode())
        except BaseException:
            self.close()
            raise

    def _first(self) -> int | None:
        """The first process in its namespaces, once all is mounted there."""
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        return next((int(each) for each in children if Path(f"/proc/{each}/comm").read_text() == "sleep\n"), None)

    def _import_image(self) -> None:
        files = self._directory / "files"
        (files / "opt" / "fumi").mkdir(parents=True)
        wanted = ["click>=8.1", "prometheus-client>=0.20"]
        environment.run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(files / "opt" / "fumi"), *wanted)
        (files / "usr" / "bin").mkdir(parents=True)
        for module in ("fumi_core", "fumi_edge"):
            shutil.copytree(ROOT / module, files / "opt" / "fumi" / module)
            program = files / "usr" / "bin" / module.replace("_", "-")
            program.write_text(PROGRAM.format(module=module))
            program.chmod(0o755)
        (self._directory / "state").mkdir()
        (self._directory / "Dockerfile").write_text(DOCKERFILE)
        words = ["tar", "--create", "--exclude=./dev/*", "--directory", str(debian("12")), "."]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            self.run("import", "-", "localhost/debian:latest", given=tar.stdout.read())
        self.run("build", "--tag", "localhost/fumi:latest", self._directory)

    def run(self, *words: str | Path, given: bytes = b"") -> str:
        """What podman prints; it is to succeed."""
        settings = [f"CONTAINERS_{name}={self._directory}/{file}" for name, file in SETTINGS.items()]
        inside = ["nsenter", f"--target={self._first()}", "--mount", "--net", "--pid", "env", *settings, "podman"]
        done = subprocess.run([*inside, *words], input=given, capture_output=True, timeout=600, check=False)
        assert done.returncode == 0, (words, done.stdout.decode()[-2000:], done.stderr.decode()[-4000:])
        return done.stdout.decode()

    def play(self, documents: list[Any], address: str) -> None:
        """Run the pod of these documents at an address, with no more changed than podman needs."""
        for each in documents:
            if each["kind"] == "Deployment":
                # All are on one host, with one set of ports.
                each["spec"]["replicas"] = 1
                for volume in each["spec"]["template"]["spec"]["volumes"]:
                    # podman 4.3 crashes where it is not set.
                    volume.get("secret", {})["optional"] = False
        text = "---\n".join(json.dumps(each) + "\n" for each in documents)
        self.run("kube", "play", "--network", "fumi", "--ip", address, "-", given=text.encode())

    def close(self) -> None:
        if self._first() is not None:
            self.run("pod", "rm", "--force", "--all")
        # The first process of a namespace ends with all others in it.
        self._holder.kill()
        self._holder.wait()
        self.network.close()
        # Some gigabyte, which pytest would keep.
        for name in ("root", "run"):
            shutil.rmtree(self._directory / name, ignore_errors=True)


SETTINGS = {"CONF": "containers.conf", "STORAGE_CONF": "storage.conf"}
