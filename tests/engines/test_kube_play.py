"""podman plays the manifests of ops/kubernetes, and mail goes through them."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core.proxy_protocol import ProxyHeader
from tests.engines.kube_play import CORE, EDGE, KubePlay
from tests.support.certificates import self_signed
from tests.support.inside import Client, connect
from tests.support.programs import Programs
from tests.support.starter import BIN, ROOT
from tests.support.waiting import until

MANIFESTS = ROOT / "ops" / "kubernetes" / "manifests"
NAME = "mx.example.org"
pytestmark = [pytest.mark.long, pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")]


class BalancedClient(Client):
    """A client whose load balancer sends a PROXY header."""

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = super()._get_socket(host, port, timeout)
        connected.sendall(ProxyHeader(2, "PROXY", "TCP4", ("192.0.2.9", 1234), ("192.0.2.1", 25)).to_bytes())
        return connected


@pytest.fixture
def podman(programs: Programs) -> Iterator[KubePlay]:
    made = KubePlay(programs.directory, self_signed(programs.directory, NAME))
    yield made
    made.close()


def ready(podman: KubePlay, address: str, port: int) -> bool:
    """Whether /readyz answers 200."""
    try:
        with connect(podman.network.pid, (address, port)) as sock:
            sock.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            return b" 200 " in sock.recv(1000)
    except OSError:
        return False


def test_mail_goes_through_the_pods_which_have_the_rights_that_the_manifests_say(
    podman: KubePlay, programs: Programs, read_yaml: Callable[[Path], list[Any]]
) -> None:
    store = ["--lmtp", "--listen", ":24", "--proxy-protocol", "off", "--deliver", f"maildir:{programs.directory}/inbox"]
    programs.start(*podman.network.command(BIN / "fumi-core", *store), log="store.log")
    podman.play(read_yaml(MANIFESTS / "core.yaml"), CORE)
    until(lambda: ready(podman, CORE, 9525), "the core")
    podman.play(read_yaml(MANIFESTS / "edge.yaml"), EDGE)
    until(lambda: ready(podman, EDGE, 9465), "the edge")

    trust = ssl.create_default_context(cafile=str(programs.directory / "cert.pem"))
    with BalancedClient(podman.network.pid, (EDGE, 2500), trust, NAME) as client:
        client.starttls(context=trust)
        client.sendmail("a@example.net", ["b@example.org"], "Subject: hello\r\n\r\ntext\r\n")
    (message,) = (programs.directory / "inbox" / "new").iterdir()
    received = message.read_text()
    assert "192.0.2.9" in received
    assert f"by {NAME}" in received

    for container in ("fumi-core-pod-0-core", "fumi-edge-pod-0-edge"):
        what = "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.Memory}} {{.EffectiveCaps}}"
        assert podman.run("inspect", "--format", what, container) == f"10001:10001 true {512 << 20} []\n"
        podman.run("stop", "--time", "60", container)
        assert podman.run("inspect", "--format", "{{.State.ExitCode}}", container) == "0\n"
