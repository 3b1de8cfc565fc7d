"""What the benchmarks need besides Fumi: the peers, installed into `.bench/`, and a certificate for one run.

aiosmtpd comes from PyPI into a virtual environment of its own for each interpreter, smtp-server from npm, HAProxy and stunnel
from Debian. Postfix is unpacked from its Debian package and never installed: `smtp-sink` and `smtp-source` run where they lie,
with their own libraries.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
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


AIOSMTPD = INSTALLED / f"aiosmtpd-{Path(sys.prefix).name}"


def aiosmtpd_python() -> str:
    """The interpreter that has aiosmtpd: the one that Fumi runs on, in another virtual environment."""
    return str(AIOSMTPD / "bin/python")


def install_aiosmtpd() -> None:
    """PyPI's aiosmtpd, on the interpreter that Fumi runs on."""
    if not list(AIOSMTPD.glob("lib/*/site-packages/aiosmtpd")):
        run(sys.executable, "-m", "venv", str(AIOSMTPD))
        run(str(AIOSMTPD / "bin/pip"), "install", "--quiet", "aiosmtpd")


def install_smtp_server() -> None:
    """npm's smtp-server."""
    if not (INSTALLED / "node/node_modules/smtp-server").is_dir():
        run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(INSTALLED / "node"), "smtp-server")


def install_postfix() -> None:
    """Unpack Debian's Postfix, and check that its programs start; as root, with the libraries they need from Debian."""
    home = unpack("postfix", "postfix")
    if "error while loading shared libraries" in (said := smtp_source_usage()) and os.geteuid() == 0:
        install_libraries(home)
        said = smtp_source_usage()
    if "usage" not in said:
        raise PeerMissing(f"Postfix's smtp-source does not start: {said}")


def install_dovecot() -> None:
    """Unpack Debian's Dovecot with its LMTP and IMAP servers; as root, with the libraries that it needs from Debian."""
    home = unpack("dovecot", "dovecot-core", "dovecot-lmtpd", "dovecot-imapd")
    if "not found" in (missing := missing_libraries(home)) and os.geteuid() == 0:
        install_libraries(home)
        missing = missing_libraries(home)
    if "not found" in missing:
        raise PeerMissing(f"libraries of Dovecot are missing: {missing}")


FILTERS = {"rspamd": "usr/bin/rspamd", "opendkim": "usr/sbin/opendkim"}


def install_filter(name: str) -> Path:
    """Unpack a mail filter of Debian's, and return where; as root, with the libraries that it needs from Debian."""
    home = unpack(name, name)
    library = {"LD_LIBRARY_PATH": str(home / "usr/lib" / name)}
    command = ["ldd", str(home / FILTERS[name])]
    for attempt in range(2):
        said = subprocess.run(command, env={**os.environ, **library}, capture_output=True, text=True, check=False).stdout
        if "not found" not in said:
            return home
        if attempt == 0 and os.geteuid() == 0:
            install_libraries(home)
    raise PeerMissing(f"libraries of {name} are missing: {said}")


def missing_libraries(home: Path) -> str:
    """What the dynamic linker says of Dovecot's programs, where something is missing."""
    library = home / "usr/lib/dovecot"
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{library}:{library}/old-stats:{library}/modules/old-stats"}
    command = ["ldd", *(str(library / name) for name in ("lmtp", "anvil", "log", "config", "auth", "imap-login", "imap"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return "".join(line for line in done.stdout.splitlines(keepends=True) if "not found" in line)


def unpack(name: str, *packages: str) -> Path:
    """Where the files of these Debian packages are, without having been installed; they are fetched where they are not there."""
    INSTALLED.mkdir(exist_ok=True)
    home = INSTALLED / name
    fetched = home / "DEBIAN/control"
    there = re.findall(r"^Package: (.*)$", fetched.read_text(), re.MULTILINE) if fetched.exists() else []
    if not set(packages) <= set(there):
        with tempfile.TemporaryDirectory(dir=INSTALLED) as directory:
            for package in packages:
                download(package, Path(directory))
            for each in Path(directory).glob("*.deb"):
                run("dpkg-deb", "--extract", str(each), str(home))
                with (Path(directory) / "control").open("a") as control:
                    control.write(output(["dpkg-deb", "--field", str(each)]))
            (home / "DEBIAN").mkdir(exist_ok=True)
            shutil.move(Path(directory) / "control", home / "DEBIAN/control")
    return home


def output(argv: Sequence[str]) -> str:
    """What a command prints; it must not fail."""
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout


def install_libraries(home: Path) -> None:
    """The libraries that unpacked packages depend on, from Debian."""
    depends = [line for line in (home / "DEBIAN/control").read_text().splitlines() if line.startswith("Depends:")]
    # Of alternatives, the first. JavaScript libraries are for a program's web pages.
    first = re.sub(r"\|[^,]*", "", " ".join(depends))
    libraries = sorted(set(re.findall(r"\blib(?!js-)[\w.+-]+", first)))
    run("apt-get", "install", "--yes", "--no-install-recommends", *libraries)


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


def interpreter() -> str:
    """The Python that runs Fumi and aiosmtpd: version, path, and whether it was built with profile-guided optimization.

    Debian's Python was, and its CONFIG_ARGS do not say so, because `debian/rules` asks for it in another way.
    """
    path = Path(sys._base_executable)  # type: ignore[attr-defined]
    if "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""):
        build = "profile-guided optimization"
    elif path.is_relative_to("/usr/bin"):
        build = "the system's; its CONFIG_ARGS do not have --enable-optimizations, and Debian's never do"
    else:
        build = "NOT built with profile-guided optimization: not what users have"
    return f"Python {sys.version.split()[0]}, {path} ({build})"


def versions() -> dict[str, str]:
    """The peers' versions by name, as far as they tell."""
    return {
        "python": interpreter(),
        "aiosmtpd": first_line([aiosmtpd_python(), "-c", "import aiosmtpd; print(aiosmtpd.__version__)"]),
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
