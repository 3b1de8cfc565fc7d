"""fumi_core.proxy_protocol parses version 1 and version 2: what it accepts, and at which byte it refuses."""

from __future__ import annotations

import pytest

from fumi_core import proxy_protocol as pp
from fumi_core.proxy_protocol import ProxyHeader, ProxyProtocolError, SSLValue, TLSInfo, parse
from tests.core.proxy_headers import SIGNATURE, TCP4, parsed, tlv, v2

# Version 1


def test_unknown_ignores_the_rest_of_the_line() -> None:
    for rest in (b"", b" ", b" ffff::1 \x00\xff 1 2 3 4", b" " + b"x" * 91):
        assert parsed(b"PROXY UNKNOWN" + rest + b"\r\n") == ProxyHeader(1, "PROXY", "UNKNOWN")


def test_a_line_of_107_bytes_is_taken_and_one_of_108_is_not() -> None:
    line = b"PROXY UNKNOWN " + b"x" * 91
    assert parse(line) is None
    assert parse(line + b"\r") is None
    assert parsed(line + b"\r\n").transport == "UNKNOWN"
    for longer in (line + b"x", line + b"x\r", line + b"x\r\n"):
        with pytest.raises(ProxyProtocolError):
            parse(longer)


def test_ipv6_comes_out_compressed_and_in_lower_case() -> None:
    header = parsed(b"PROXY TCP6 2001:0DB8:0:0:0:0:0:000A ::FFFF:192.0.2.1 1 65535\r\n")
    assert header.source == ("2001:db8::a", 1)
    assert header.destination == ("::ffff:192.0.2.1", 65535)


@pytest.mark.parametrize(
    ("addresses", "source", "destination"),
    [
        (b"192.0.2.1 2001:db8::1", "::ffff:192.0.2.1", "2001:db8::1"),
        (b"2001:db8::1 192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"),
        (b"192.0.2.1 192.0.2.2", "::ffff:192.0.2.1", "::ffff:192.0.2.2"),
    ],
)
def test_an_ipv4_address_in_a_tcp6_line_is_its_mapped_address(addresses: bytes, source: str, destination: str) -> None:
    header = parsed(b"PROXY TCP6 " + addresses + b" 1 2\r\n")
    assert (header.source, header.destination) == ((source, 1), (destination, 2))
    assert parsed(header.to_bytes()) == header


@pytest.mark.parametrize(
    ("line", "wrong_at"),
    [
        (b"proxy TCP4 ", 1),
        (b"PROXX", 5),
        (b"PROXY  TCP4", 7),
        (b"PROXY TCP5", 10),
        (b"PROXY UDP4", 8),
        (b"PROXY TCP4\r\n", 11),
        (b"PROXY UNKNOWN\n", 14),
        (b"PROXY UNKNOWNS", 14),
        (b"PROXY UNKNOWN \rx", 16),
        (b"PROXY TCP4  1.2.3.4", 12),
        (b"PROXY TCP4 01.2.3.4", 13),
        (b"PROXY TCP4 256.", 14),
        (b"PROXY TCP4 1.2.3.4.5", 19),
        (b"PROXY TCP4 1.2.3 ", 17),
        (b"PROXY TCP4 ::1", 12),
        (b"PROXY TCP6 01.2.3.4", 14),
        (b"PROXY TCP6 1.2.3.4:", 19),
        (b"PROXY TCP6 1.2.3.4 1.2.3 ", 25),
        (b"PROXY TCP6 fe80::1%eth0", 19),
        (b"PROXY TCP6 12345:", 16),
        (b"PROXY TCP6 1::2::", 17),
        (b"PROXY TCP6 1:2:3:4:5:6:7:8:", 27),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4  1", 28),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 01", 29),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 65536", 32),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 +1", 28),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 ", 31),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n", 31),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\rx", 32),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 \r\n", 30),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 \xd9\xa1", 28),
    ],
)
def test_a_line_is_refused_at_the_first_byte_that_spoils_it(line: bytes, wrong_at: int) -> None:
    assert all(parse(line[:length]) is None for length in range(wrong_at))
    for length in range(wrong_at, len(line) + 1):
        with pytest.raises(ProxyProtocolError):
            parse(line[:length])


# Version 2


@pytest.mark.parametrize(
    ("raw", "wrong_at"),
    [
        (b"EHLO x\r\n", 1),
        (b"\r\nQUIT\r\n", 3),
        (SIGNATURE[:-1] + b"\r", 12),
        (v2(TCP4, command=0x11), 13),
        (v2(TCP4, command=0x31), 13),
        (v2(TCP4, command=0x22), 13),
        (v2(TCP4, family=0x13), 14),
        (v2(TCP4, family=0x41), 14),
        (v2(TCP4, family=0x10), 14),
        (v2(TCP4, family=0x01), 14),
        (v2(length=0x1000), 15),
        (v2(length=4081), 16),
        (v2(command=0x20, length=4081), 16),
        (v2(TCP4[:-1]), 16),
        (v2(bytes(35), family=0x21), 16),
        (v2(bytes(215), family=0x31), 16),
        (v2(TCP4 + b"\x01"), 16),
        (v2(TCP4 + b"\x01\x00\x02xxx\x01"), 31),
        (v2(TCP4 + b"\x01\x00\x02x"), 31),
        (v2(TCP4 + tlv(pp.PP2_TYPE_CRC32C, b"12345")), 31),
        (v2(TCP4 + tlv(pp.PP2_TYPE_CRC32C, b"")), 31),
        (v2(TCP4 + tlv(pp.PP2_TYPE_CRC32C, b"1234")), 35),
        (v2(TCP4 + tlv(pp.PP2_TYPE_CRC32C, bytes(4)) * 2), 38),
        (v2(TCP4 + tlv(pp.PP2_TYPE_UNIQUE_ID, bytes(129))), 31),
        (v2(TCP4 + tlv(pp.PP2_TYPE_SSL, bytes(4))), 31),
        (v2(TCP4 + tlv(pp.PP2_TYPE_SSL, bytes(5) + b"\x21\x00")), 31),
        (v2(TCP4 + tlv(pp.PP2_TYPE_SSL, bytes(5) + b"\x21\x00\x02x")), 39),
        (v2(b"\x01\x00", family=0x00), 16),
    ],
)
def test_a_binary_header_is_refused_at_the_first_byte_that_spoils_it(raw: bytes, wrong_at: int) -> None:
    assert all(parse(raw[:length]) is None for length in range(wrong_at))
    for length in range(wrong_at, len(raw) + 1):
        with pytest.raises(ProxyProtocolError):
            parse(raw[:length])


def test_local_ignores_everything_but_the_length() -> None:
    for family in (0x00, 0x11, 0xFF):
        for block in (TCP4, b"\x03\x00\x04junk", b"\xff" * 4080):
            raw = v2(block, command=0x20, family=family)
            assert parsed(raw) == ProxyHeader(2, "LOCAL")
            assert parse(raw[:-1]) is None


def test_unspecified_has_no_addresses_but_its_tlvs() -> None:
    header = parsed(v2(tlv(pp.PP2_TYPE_UNIQUE_ID, b"id"), family=0x00))
    assert header == ProxyHeader(2, "PROXY", "UNKNOWN", None, None, ((pp.PP2_TYPE_UNIQUE_ID, b"id"),))


def test_a_header_of_4096_bytes_is_taken() -> None:
    raw = v2(TCP4 + tlv(0xE0, bytes(4096 - 16 - 12 - 3)))
    assert len(raw) == 4096
    assert parsed(raw).tlvs == ((0xE0, bytes(4065)),)
    assert len(ProxyHeader(2, "PROXY", tlvs=((0xE0, bytes(4070)),)).to_bytes()) == 4096


def test_the_ssl_tlv_alone_does_not_say_that_there_was_tls() -> None:
    for client, secure in ((0x00, False), (0x06, False), (0x01, True), (0xF9, True)):
        header = parsed(v2(TCP4 + tlv(pp.PP2_TYPE_SSL, bytes([client]) + bytes(4))))
        assert (header.tls is not None) is secure


@pytest.mark.parametrize(
    ("client", "verify", "presented", "verified"),
    [(1, 0, False, False), (1, 1, False, False), (3, 0, True, True), (5, 0, True, True), (7, 20, True, False)],
)
def test_a_certificate_is_verified_only_if_it_was_presented(client: int, verify: int, presented: bool, verified: bool) -> None:
    value = SSLValue(client, verify, ((pp.PP2_SUBTYPE_SSL_CN, b"name"),)).to_bytes()
    tls = parsed(v2(TCP4 + tlv(pp.PP2_TYPE_SSL, value))).tls
    assert tls == TLSInfo(client_cert=presented, client_cert_verified=verified, client_cn="name" if presented else None)


def test_every_registered_tlv_has_a_name() -> None:
    inside = {0x21: "version", 0x22: "cn", 0x23: "cipher", 0x24: "sig_alg", 0x25: "key_alg", 0x26: "group"}
    inside |= {0x27: "sig_scheme"}
    ssl = SSLValue(1, 0, (*((kind, name.encode()) for kind, name in inside.items()), (0x28, b"\x30\x82")))
    outside = tlv(0x01, b"h2") + tlv(0x02, b"host") + tlv(0x04, b"pad") + tlv(0x30, b"blue") + tlv(0xEA, b"\x01aws")
    header = parsed(v2(TCP4 + outside + tlv(0x20, ssl.to_bytes())))
    assert (header.alpn, header.authority, header.noop, header.netns) == ("h2", "host", b"pad", "blue")
    assert (0xEA, b"\x01aws") in header.tlvs
    assert header.ssl == ssl
    assert [getattr(header.ssl, name) for name in inside.values()] == list(inside.values())
    assert header.ssl.client_cert == b"\x30\x82"


def test_of_a_tlv_sent_twice_the_first_counts() -> None:
    assert parsed(v2(TCP4 + tlv(0x02, b"first") + tlv(0x02, b"second"))).authority == "first"


def test_text_that_is_not_utf_8_is_shown_escaped() -> None:
    assert parsed(v2(TCP4 + tlv(0x02, b"\xffmail\xc3\xa9"))).authority == "\\xffmailé"
