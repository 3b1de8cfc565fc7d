"""Each ready-made plugin, by what a client hears."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fumi_core import Fumi, plugins
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.testing import running
from tests.core.client import Connect


@pytest.fixture
def app() -> Fumi:
    return Fumi(auth_optional=True, close_timeout=0.2)


def test_require_tls(app: Fumi, connect: Connect) -> None:
    with running(app.use(plugins.require_tls())) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>") == b"530 5.7.0 Must issue a STARTTLS command first\r\n"


def test_require_tls_accepts_mail_over_tls(connect: Connect) -> None:
    app = Fumi(auth_optional=True, assume_tls=True).use(plugins.require_tls())
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>").startswith(b"250")
        client.close()


@pytest.mark.parametrize("plugin", [plugins.allowlist(["192.0.2.0/24"]), plugins.denylist(["127.0.0.1"])])
def test_a_proxys_health_check_is_judged_only_if_it_sends_mail(connect: Connect, plugin: Callable[[Fumi], None]) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2).use(plugin)
    with running(app) as server:
        client = connect(server.port, ProxyHeader(2, "LOCAL").to_bytes())
        assert client.banner.startswith(b"220")
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>") == b"554 5.7.1 Access denied\r\n"
        client.close()


@pytest.mark.parametrize(
    ("ips", "banner"), [(["127.0.0.1"], b"554 5.7.1"), (["127.0.0.0/8"], b"554"), (["::1", "10.0.0.0/8"], b"220")]
)
def test_denylist(app: Fumi, connect: Connect, ips: list[str], banner: bytes) -> None:
    with running(app.use(plugins.denylist(ips))) as server:
        assert connect(server.port).banner.startswith(banner)


def test_denylist_raises_an_error_for_anything_but_networks() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        plugins.denylist(["nonsense"])


@pytest.mark.parametrize(("cidrs", "banner"), [(["10.0.0.0/8", "::1"], b"554 5.7.1"), (["127.0.0.0/8"], b"220")])
def test_allowlist(app: Fumi, connect: Connect, cidrs: list[str], banner: bytes) -> None:
    with running(app.use(plugins.allowlist(cidrs))) as server:
        assert connect(server.port).banner.startswith(banner)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: plugins.allowlist("10.0.0.0/8"), r"write allowlist\(\["),
        (lambda: plugins.allowlist([]), "write the networks"),
        (lambda: plugins.allowlist(["10.0.0.1/8"]), "write 192.0.2.0/24"),
        (lambda: plugins.denylist("10.0.0.1"), r"write denylist\(\["),
        (lambda: plugins.denylist([1]), r"write denylist\(\["),  # type: ignore[list-item]
        (lambda: plugins.rcpt_filter("ours.example"), r"write rcpt_filter\(\["),
        (lambda: plugins.rcpt_filter(["@ours.example"]), "write what follows the @"),
        (lambda: plugins.sender_block(["a@b.example"]), "write what follows the @"),
        (lambda: plugins.sender_block(None), r"write sender_block\(\["),  # type: ignore[arg-type]
        (lambda: plugins.max_size(0), "of at least 1"),
        (lambda: plugins.max_size("10"), "of at least 1"),  # type: ignore[arg-type]
    ],
)
def test_a_plugin_that_cannot_work_is_not_made(make: Callable[[], object], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        make()


def test_sender_block(app: Fumi, connect: Connect) -> None:
    with running(app.use(plugins.sender_block(["Blocked.example"]))) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<a@blocked.EXAMPLE>").startswith(b"550 5.7.1")
        assert client.say("MAIL FROM:<a@sub.blocked.example>").startswith(b"250")


def test_rcpt_filter(app: Fumi, connect: Connect) -> None:
    with running(app.use(plugins.rcpt_filter(["ours.example"]))) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.say("MAIL FROM:<>")
        assert client.say("RCPT TO:<a@theirs.example>").startswith(b"550 5.7.1")
        assert client.say("RCPT TO:<a@OURS.example>").startswith(b"250")
        assert client.say("RCPT TO:<postmaster>").startswith(b"250")


def test_max_size(app: Fumi, connect: Connect) -> None:
    with running(app.use(plugins.max_size(20))) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<> SIZE=21").startswith(b"552 5.3.4")
        for text, code in (("x" * 18, b"250"), ("x" * 19, b"552 5.3.4")):
            client.envelope()
            client.say("DATA")
            assert client.say(text + "\r\n.").startswith(code)
        assert len(server.messages) == 1
