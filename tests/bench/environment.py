"""What the benchmarks need besides Fumi: the peers, installed into `.bench/`, and a certificate for one run.

aiosmtpd comes from PyPI into a virtual environment of its own, smtp-server from npm, HAProxy and stunnel from Debian. Postfix is
unpacked from its Debian package and never installed: `smtp-sink` and `smtp-source` run where they lie, with their own libraries.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".bench"
# Program → Debian package.
PROGRAMS = {"haproxy": "haproxy", "stunnel4": "stunnel4", "node": "nodejs", "npm": "npm", "openssl": "openssl"}


class PeerMissing(Exception):
    """A peer is not there and could not be installed; the message says what to do."""


@dataclass(frozen=True)
class Site:
    """Where one run of the benchmarks finds things: a directory that goes with it, and the certificate in it."""

    directory: Path

    @property
    def certificate(self) -> Path:
        """PEM of a self-signed ECDSA P-256 certificate for `localhost`."""
        return self.directory / "certificate.pem"

    @property
    def key(self) -> Path:
        """PEM of its key."""
        return self.directory / "key.pem"

    @property
    def certificate_and_key(self) -> Path:
        """Both in one file, as HAProxy wants them."""
        return self.directory / "certificate_and_key.pem"

    def log(self, name: str) -> Path:
        """The log of the contestant of this name."""
        return self.directory / f"{name}.log"


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """A fresh directory with a fresh certificate, gone after the block."""
    with tempfile.TemporaryDirectory(prefix="fumi-bench-") as directory:
        made = Site(Path(directory))
        make_certificate(made)
        yield made


def make_certificate(made: Site) -> None:
    """Write the certificate and its key."""
    algorithm = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    run("openssl", "req", "-x509", "-days", "2", *algorithm, *name, "-keyout", str(made.key), "-out", str(made.certificate))
    made.certificate_and_key.write_text(made.certificate.read_text() + made.key.read_text())


def postfix_program(name: str) -> list[str]:
    """The command that runs one of Postfix's test programs."""
    return [str(INSTALLED / "postfix/usr/sbin" / name)]


def postfix_environment() -> dict[str, str]:
    """What these programs need to find Postfix's libraries."""
    return {"LD_LIBRARY_PATH": str(INSTALLED / "postfix/usr/lib/postfix")}


def install() -> None:
    """Install every peer that is not there yet; PeerMissing when that fails."""
    INSTALLED.mkdir(exist_ok=True)
    install_programs()
    install_aiosmtpd()
    install_smtp_server()
    install_postfix()


def install_programs() -> None:
    """HAProxy, stunnel, Node and OpenSSL from Debian, as root; otherwise PeerMissing says exactly what to install."""
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if not missing:
        return
    if os.geteuid() != 0:
        raise PeerMissing(f"as root: apt-get install {' '.join(missing)}")
    run("apt-get", "update")
    run("apt-get", "install", "--yes", "--no-install-recommends", *missing)


def install_aiosmtpd() -> None:
    """PyPI's aiosmtpd, on the interpreter that Fumi runs on."""
    home = INSTALLED / "aiosmtpd"
    if not list(home.glob("lib/*/site-packages/aiosmtpd")):
        run(sys.executable, "-m", "venv", str(home))
        run(str(home / "bin/pip"), "install", "--quiet", "aiosmtpd")


def install_smtp_server() -> None:
    """npm's smtp-server."""
    if not (INSTALLED / "node/node_modules/smtp-server").is_dir():
        run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(INSTALLED / "node"), "smtp-server")


def install_postfix() -> None:
    """Unpack Debian's Postfix, and see that its programs start; as root, with the libraries they need from Debian."""
    INSTALLED.mkdir(exist_ok=True)
    home = INSTALLED / "postfix"
    control = home / "DEBIAN/control"
    if not control.exists():
        with tempfile.TemporaryDirectory(dir=INSTALLED) as directory:
            download("postfix", Path(directory))
            (package,) = Path(directory).glob("postfix_*.deb")
            run("dpkg-deb", "--raw-extract", str(package), str(home))
    if "error while loading shared libraries" in (said := smtp_source_usage()) and os.geteuid() == 0:
        (depends,) = (line for line in control.read_text().splitlines() if line.startswith("Depends:"))
        run("apt-get", "install", "--yes", "--no-install-recommends", *re.findall(r"\blib[\w.+-]+", depends))
        said = smtp_source_usage()
    if "usage" not in said:
        raise PeerMissing(f"Postfix's smtp-source does not start: {said}")


def smtp_source_usage() -> str:
    """What smtp-source says when it is not told what to do."""
    environment = {**os.environ, **postfix_environment()}
    return subprocess.run(
        postfix_program("smtp-source"), env=environment, stderr=subprocess.PIPE, text=True, check=False
    ).stderr.strip()


def download(package: str, directory: Path) -> None:
    """Fetch a Debian package without installing it; on a machine that has never fetched the package lists, those first."""
    try:
        run("apt-get", "download", package, cwd=directory)
    except PeerMissing:
        if os.geteuid() != 0:
            raise
        run("apt-get", "update")
        run("apt-get", "download", package, cwd=directory)


def run(*argv: str, cwd: Path | None = None) -> None:
    """Run a command to its end, silently; PeerMissing with what it said when it fails."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerMissing(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()[-2000:]}")


def versions() -> dict[str, str]:
    """The peers' versions by name, as far as they tell."""
    return {
        "python": sys.version.split()[0],
        "aiosmtpd": first_line([str(INSTALLED / "aiosmtpd/bin/python"), "-c", "import aiosmtpd; print(aiosmtpd.__version__)"]),
        "node": first_line(["node", "--version"]),
        "smtp-server": json.loads((INSTALLED / "node/node_modules/smtp-server/package.json").read_text())["version"],
        "haproxy": first_line(["haproxy", "-v"]),
        "stunnel": first_line(["stunnel4", "-version"], "stunnel"),
        "openssl": first_line(["openssl", "version"]),
    }


def first_line(argv: Sequence[str], starting: str = "") -> str:
    """The first line that a command prints that starts like this, or nothing."""
    said = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
    return next((line for line in said.splitlines() if line.startswith(starting)), "")
