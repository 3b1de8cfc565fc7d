"""fumi_core.proxy_protocol writes headers: what it writes it reads, and the checksum is CRC32C."""

from __future__ import annotations

import random

import pytest

from fumi_core import proxy_protocol as pp
from fumi_core.crc32c import crc32c
from fumi_core.proxy_protocol import ProxyHeader, SSLValue, TLSInfo, parse
from tests.core.proxy_headers import parsed, v2

ENDPOINTS: dict[str, tuple[pp.Endpoint | None, pp.Endpoint | None]] = {
    "TCP4": (("192.0.2.1", 12345), ("198.51.100.2", 25)),
    "UDP4": (("192.0.2.1", 0), ("198.51.100.2", 65535)),
    "TCP6": (("2001:db8::1", 12345), ("::ffff:192.0.2.1", 465)),
    "UDP6": (("::", 12345), ("fe80::1", 53)),
    "UNIX": ("/run/client.sock", "/run/fumi.sock"),
    "UNIX_DGRAM": ("\0abstract\0name", ""),
    "UNKNOWN": (None, None),
}

TLVS = (
    (pp.PP2_TYPE_ALPN, b"smtp"),
    (pp.PP2_TYPE_NOOP, b""),
    (pp.PP2_TYPE_UNIQUE_ID, b"x" * 128),
    (pp.PP2_TYPE_NETNS, b"blue"),
    (0xEA, b"\x01vpce-1"),
    (0xFF, b"\x00" * 300),
)


@pytest.mark.parametrize("transport", ENDPOINTS)
@pytest.mark.parametrize("tlvs", [(), TLVS], ids=["bare", "with TLVs"])
def test_what_version_2_writes_it_reads(transport: str, tlvs: tuple[pp.TLV, ...]) -> None:
    header = ProxyHeader(2, "PROXY", transport, *ENDPOINTS[transport], tlvs)
    raw = header.to_bytes()
    again = parsed(raw)
    assert again.tlvs[:-1] == tlvs
    assert again.tlvs[-1][0] == pp.PP2_TYPE_CRC32C
    assert (again.transport, again.source, again.destination) == (transport, *ENDPOINTS[transport])
    assert again.to_bytes() == raw
    assert all(parse(raw[:length]) is None for length in range(len(raw)))


@pytest.mark.parametrize("transport", ENDPOINTS)
def test_tlvs_may_be_encoded_before_the_header(transport: str) -> None:
    encoded = pp.encode_tlvs(TLVS[:2]) + pp.encode_tlvs(TLVS[2:])
    whole = ProxyHeader(2, "PROXY", transport, *ENDPOINTS[transport], TLVS)
    assert pp.v2_header(transport, *ENDPOINTS[transport], encoded) == whole.to_bytes()


@pytest.mark.parametrize("transport", ["TCP4", "TCP6"])
def test_what_version_1_writes_it_reads(transport: str) -> None:
    header = ProxyHeader(1, "PROXY", transport, *ENDPOINTS[transport])
    assert parsed(header.to_bytes()) == header


def test_version_1_is_the_line_of_the_specification() -> None:
    header = ProxyHeader(1, "PROXY", "TCP4", ("192.168.0.1", 56324), ("192.168.0.11", 443))
    assert header.to_bytes() == b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"


@pytest.mark.parametrize("transport", ["UNIX", "UNIX_DGRAM", "UDP4", "UDP6", "UNKNOWN"])
def test_version_1_sends_unknown_for_what_it_cannot_express(transport: str) -> None:
    assert ProxyHeader(1, "PROXY", transport, *ENDPOINTS[transport]).to_bytes() == b"PROXY UNKNOWN\r\n"
    assert ProxyHeader(1, "LOCAL").to_bytes() == b"PROXY UNKNOWN\r\n"


def test_local_is_written_without_addresses_but_with_a_checksum() -> None:
    raw = ProxyHeader(2, "LOCAL", "TCP4", *ENDPOINTS["TCP4"]).to_bytes()
    assert raw[:19] == v2(command=0x20, family=0, length=7) + b"\x03\x00\x04"
    assert len(raw) == 23
    assert int.from_bytes(raw[-4:], "big") == crc32c(raw[:-4] + bytes(4))
    assert parsed(raw) == ProxyHeader(version=2, command="LOCAL")


def test_a_checksum_among_the_tlvs_is_computed_at_the_end() -> None:
    header = ProxyHeader(2, "PROXY", "TCP4", *ENDPOINTS["TCP4"], ((pp.PP2_TYPE_CRC32C, b"junk"), (0xE0, b"x")))
    again = parsed(header.to_bytes())
    assert [kind for kind, _ in again.tlvs] == [0xE0, pp.PP2_TYPE_CRC32C]


def test_addresses_are_written_as_the_protocol_has_them() -> None:
    source, destination = ("2001:DB8:0:0::1", 1), ("fe80::1%eth0", 2)
    for version in (1, 2):
        again = parsed(ProxyHeader(version, "PROXY", "TCP6", source, destination).to_bytes())
        assert again.source == ("2001:db8::1", 1)
        assert again.destination == ("fe80::1", 2)


def test_a_path_is_bytes_in_disguise_as_everywhere_in_python() -> None:
    path = b"/run/\xff\xfe".decode("utf-8", "surrogateescape")
    assert parsed(ProxyHeader(2, "PROXY", "UNIX", path, "x" * 108).to_bytes()).source == path
    assert parsed(ProxyHeader(2, "PROXY", "UNIX", path, "x" * 108).to_bytes()).destination == "x" * 108


@pytest.mark.parametrize(
    "tls",
    [
        TLSInfo(),
        TLSInfo("TLSv1.3", "TLS_AES_128_GCM_SHA256", "mail.example.com", "smtp"),
        TLSInfo("TLSv1.2", None, None, None, True, True, "client.example.net"),
        TLSInfo("TLSv1.3", None, "bücher.example", None, True, False, "Łódź"),
        TLSInfo("TLSv1.3", None, None, None, True, False, None),
    ],
    ids=["bare", "server only", "verified", "unverified", "no name"],
)
def test_tls_facts_are_the_same_after_encoding_and_decoding(tls: TLSInfo) -> None:
    header = ProxyHeader(2, "PROXY", "TCP4", *ENDPOINTS["TCP4"], pp.tls_tlvs(tls))
    assert parsed(header.to_bytes()).tls == tls


def test_the_ssl_flags_and_verify_are_the_specifications() -> None:
    def ssl(tls: TLSInfo, resumed: bool = False) -> SSLValue:
        return SSLValue.from_bytes(dict(pp.tls_tlvs(tls, resumed))[pp.PP2_TYPE_SSL])

    assert (ssl(TLSInfo()).client, ssl(TLSInfo()).verify) == (1, 1)
    assert (ssl(TLSInfo(client_cert=True)).client, ssl(TLSInfo(client_cert=True)).verify) == (7, 1)
    assert (ssl(TLSInfo(), resumed=True).client, ssl(TLSInfo(client_cert=True), resumed=True).client) == (1, 5)
    assert ssl(TLSInfo(client_cert=True, client_cert_verified=True)).verify == 0
    assert ssl(TLSInfo(client_cn="never shown")).cn is None


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (ProxyHeader(3, "PROXY"), "version"),
        (ProxyHeader(2, "HELLO"), "command"),
        (ProxyHeader(2, "PROXY", "SCTP4"), "transport"),
        (ProxyHeader(2, "PROXY", "TCP4"), "address and a port"),
        (ProxyHeader(1, "PROXY", "TCP4", "/path", "/path"), "address and a port"),
        (ProxyHeader(2, "PROXY", "TCP4", ("::1", 1), ("::1", 1)), "not an address"),
        (ProxyHeader(1, "PROXY", "TCP4", ("1.2.3.4 5", 1), ("1.2.3.4", 1)), "not an address"),
        (ProxyHeader(1, "PROXY", "TCP4", ("1.2.3.4", 65536), ("1.2.3.4", 1)), "port"),
        (ProxyHeader(2, "PROXY", "TCP6", ("::1", 1), ("::1", -1)), "port"),
        (ProxyHeader(2, "PROXY", "UNIX"), "path"),
        (ProxyHeader(2, "PROXY", "UNIX", "x" * 109, ""), "108"),
        (ProxyHeader(2, "PROXY", "UNIX", "a\0b", ""), "NUL"),
        (ProxyHeader(2, "PROXY", "UNIX", "", "\0a\0"), "NUL"),
        (ProxyHeader(1, "PROXY", tlvs=((0xE0, b""),)), "no TLVs"),
        (ProxyHeader(2, "PROXY", tlvs=((256, b""),)), "out of range"),
        (ProxyHeader(2, "PROXY", tlvs=((0xE0, bytes(65536)),)), "out of range"),
        (ProxyHeader(2, "PROXY", tlvs=((0xE0, bytes(4071)),)), "4096"),
        (ProxyHeader(2, "PROXY", tlvs=((pp.PP2_TYPE_UNIQUE_ID, bytes(129)),)), "128"),
        (ProxyHeader(2, "PROXY", tlvs=((pp.PP2_TYPE_SSL, b"\x01"),)), "SSL"),
    ],
)
def test_a_header_that_cannot_be_encoded_is_a_value_error(header: ProxyHeader, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        header.to_bytes()


# The checksum


def _bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_crc32c_has_the_value_that_everybody_gets() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720 B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_crc32c_is_right_at_every_length() -> None:
    numbers = random.Random(5)
    for length in [*range(4, 300), 511, 1024, 2047, 4096]:
        data = numbers.randbytes(length)
        assert crc32c(data) == _bit_by_bit(data)
