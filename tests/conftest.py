"""Fixtures for tests with several programs: an edge in front of a core, what they deliver, and files of YAML."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import self_signed
from tests.support.limits import pytest_runtest_protocol as pytest_runtest_protocol
from tests.support.ports import free_port
from tests.support.programs import Programs, Setup
from tests.support.starter import BIN


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with contextlib.closing(Programs(tmp_path)) as programs:
        yield programs


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and 127.0.0.1, and its key; both.pem beside them has the two."""
    directory = tmp_path_factory.mktemp("certificate")
    cert, key = self_signed(directory, "localhost", "127.0.0.1")
    (directory / "both.pem").write_bytes(cert.read_bytes() + key.read_bytes())
    return cert, key


@pytest.fixture
def two_processes(programs: Programs, certificate: tuple[Path, Path]) -> Callable[..., Setup]:
    """fumi-edge in front of fumi-core, with defaults wherever there are any."""

    def start(*edge_flags: str) -> Setup:
        core_port, tls_port, starttls_port = free_port(), free_port(), free_port()
        core = programs.start(BIN / "fumi-core", "--listen", f"127.0.0.1:{core_port}", port=core_port, log="core.log")
        flags: list[str | Path] = ["--cert", certificate[0], "--key", certificate[1], "--backend", f"127.0.0.1:{core_port}"]
        flags += ["--listen", f"127.0.0.1:{tls_port}", "--starttls-listen", f"127.0.0.1:{starttls_port}", *edge_flags]
        edge = programs.start(BIN / "fumi-edge", *flags, port=starttls_port, log="edge.log")
        return Setup(tls_port, starttls_port, programs.maildir(), {"core": core, "edge": edge})

    return start


@pytest.fixture
def dev(programs: Programs) -> Callable[[], Setup]:
    """fumi-edge --dev, on free ports."""

    def start() -> Setup:
        tls_port, starttls_port = free_port(), free_port()
        flags = ["--listen", f"127.0.0.1:{tls_port}", "--starttls-listen", f"127.0.0.1:{starttls_port}"]
        flags += ["--metrics", "127.0.0.1:0"]
        edge = programs.start(BIN / "fumi-edge", "--dev", *flags, port=starttls_port, log="edge.log")
        return Setup(tls_port, starttls_port, programs.maildir(), {"edge": edge})

    return start


YAML = """
import json, sys, yaml

class Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"{node.start_mark}: a key stands there twice: {keys}"
        return super().construct_mapping(node, deep)

json.dump(list(yaml.load_all(sys.stdin, Loader)), sys.stdout)
"""


@pytest.fixture(scope="session")
def read_yaml() -> Callable[[Path], list[Any]]:
    """Reads the documents of a YAML file: in Debian's own Python, which has PyYAML from python3-yaml; ours is not to need it."""

    def read(path: Path) -> list[Any]:
        done = subprocess.run(["/usr/bin/python3", "-c", YAML], input=path.read_bytes(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        documents: list[Any] = json.loads(done.stdout)
        return documents

    return read
