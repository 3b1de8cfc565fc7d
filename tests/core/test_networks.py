"""An IPv4-mapped IPv6 address is the IPv4 address that it stands for, whoever writes it: operator, kernel, proxy or client."""

from __future__ import annotations

import pytest

from fumi_core import Fumi, plugins
from fumi_core.runtime.addresses import Networks, block_of, peer_of, unmapped
from fumi_core.testing import running
from tests.core.client import Connect

SPELLINGS = ["::ffff:192.0.2.7", "::FFFF:192.0.2.7", "::ffff:c000:207", "0:0:0:0:0:ffff:192.0.2.7", "0:0:0:0:0:FFFF:C000:0207"]


@pytest.mark.parametrize("host", [*SPELLINGS, "192.0.2.7"])
def test_every_spelling_is_one_address(host: str) -> None:
    assert unmapped(host) == "192.0.2.7"
    assert peer_of((host, 25, 0, 0)) == ("192.0.2.7", 25)
    assert block_of(host, ipv4=24, ipv6=64) == "192.0.2.0/24"


@pytest.mark.parametrize("host", ["::1", "2001::ffff:c000:207", "::192.0.2.7", "64:ff9b::c000:207", "unix", "unix:/a\0b", ""])
def test_other_addresses_stay_what_they_are(host: str) -> None:
    assert unmapped(host) == host


@pytest.mark.parametrize("host", [*SPELLINGS, "192.0.2.7"])
@pytest.mark.parametrize(
    ("network", "inside"),
    [
        ("192.0.2.7", True), ("192.0.2.0/24", True), ("0.0.0.0/0", True), ("192.0.2.8", False),
        ("::ffff:192.0.2.7", True), ("::ffff:192.0.2.0/120", True), ("::ffff:c000:200/120", True), ("::ffff:0:0/96", True),
        ("::ffff:192.0.2.8", False), ("::ffff:192.0.3.0/120", False),
        ("::1", False), ("2001:db8::/32", False), ("::/0", False), ("::192.0.2.0/120", False),
    ],
)  # fmt: skip
def test_networks_match_mapped_and_unmapped_alike(host: str, network: str, inside: bool) -> None:
    assert (host in Networks([network])) is inside


def test_networks_of_ipv6_are_not_taken_for_others() -> None:
    assert "2001:db8::1" in Networks(["2001:db8::/32"])
    assert "::1" in Networks(["::/0"])
    assert "2001:db8::1" not in Networks(["::ffff:0:0/96"])


@pytest.mark.parametrize("listed", ["::ffff:192.0.2.0/120", "192.0.2.0/24"])
@pytest.mark.parametrize("address", ["TCP4 192.0.2.7 192.0.2.1", *(f"TCP6 {each} 2001:db8::1" for each in SPELLINGS)])
def test_lists_know_a_client_however_the_proxy_writes_its_address(connect: Connect, listed: str, address: str) -> None:
    denied = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2).use(plugins.denylist([listed]))
    allowed = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2).use(plugins.allowlist([listed]))
    for app, code in ((denied, b"554 "), (allowed, b"220 ")):
        with running(app) as server:
            assert connect(server.port, f"PROXY {address} 1 2\r\n".encode()).banner.startswith(code)


@pytest.mark.parametrize("trusted", ["::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "127.0.0.1"])
def test_a_trusted_proxy_may_be_written_either_way(connect: Connect, trusted: str) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", trusted_proxies=(trusted,), close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port, b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:192.0.2.1 1 2\r\n")
        assert client.banner.startswith(b"220 ")


def test_clients_behind_mapped_addresses_have_a_rate_each(connect: Connect) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2).use(plugins.rate_limit(1, 1))
    with running(app) as server:
        for host, code in (("::ffff:192.0.2.7", b"250"), ("::ffff:192.0.2.8", b"250"), ("::ffff:c000:207", b"450")):
            client = connect(server.port, f"PROXY TCP6 {host} 2001:db8::1 1 2\r\n".encode())
            client.say("EHLO x")
            assert client.say("MAIL FROM:<>").startswith(code)


def test_xclient_may_name_a_mapped_address(connect: Connect) -> None:
    app = Fumi(auth_optional=True, use_xclient=True, close_timeout=0.2).use(plugins.denylist(["192.0.2.7"]))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("XCLIENT ADDR=IPV6:::ffff:192.0.2.7").startswith(b"554 ")
