"""fumi_core.proxy_protocol against recorded headers, its own writer, and bytes that lie."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fumi_core import proxy_protocol as pp
from fumi_core.proxy_protocol import ProxyHeader, ProxyProtocolError, SSLValue, TLSInfo, parse

_RECORDED = json.loads((Path(__file__).parents[1] / "vectors" / "proxy_headers.json").read_text())
HEADERS = {name: bytes.fromhex(vector["header_hex"]) for name, vector in _RECORDED.items()}
FACTS = {name: vector["client"] for name, vector in _RECORDED.items() if not vector["client"].get("health_check")}
CHECKSUMMED = sorted(name for name, raw in HEADERS.items() if raw[28:31] == b"\x03\x00\x04")

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
TCP4 = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + b"\x30\x39\x00\x19"


def v2(block: bytes = b"", *, command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    return SIGNATURE + bytes([command, family]) + (len(block) if length is None else length).to_bytes(2, "big") + block


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def parsed(data: bytes) -> ProxyHeader:
    found = parse(data)
    assert found is not None
    assert found[1] == len(data)
    return found[0]


def outcome(data: bytes) -> ProxyHeader | None:
    """What `parse` makes of *data*, every property looked at; None for a ProxyProtocolError or an incomplete header."""
    try:
        found = parse(data)
    except ProxyProtocolError:
        return None
    if found is None:
        return None
    header, used = found
    assert 0 < used <= len(data)
    for name in ("tls", "ssl", "alpn", "authority", "unique_id", "crc32c", "noop", "netns"):
        getattr(header, name)
    return header


# Headers recorded from HAProxy, stunnel, nginx and hitch


@pytest.mark.parametrize("name", HEADERS)
def test_a_recorded_header_is_taken_whole_and_nothing_behind_it(name: str) -> None:
    for behind in (b"", b"EHLO x\r\n", b"\x00", b"\xff" * 5000):
        found = parse(HEADERS[name] + behind)
        assert found is not None
        assert found[1] == len(HEADERS[name])


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_that_a_recorded_header_carries_comes_out(name: str) -> None:
    raw, facts = HEADERS[name], FACTS[name]
    header = parsed(raw)
    assert header.command == "PROXY"
    assert header.source == (facts["source"], facts["source_port"])
    if b"\x20\x00" not in raw[16:]:
        assert header.tls is None
        return

    def carried(fact: Any) -> Any:
        return fact if fact is not None and fact.encode() in raw else None

    assert facts["tls"]
    assert header.tls is not None
    assert header.tls.version == facts["version"]
    assert header.tls.cipher == carried(facts["cipher"])
    assert header.tls.sni == carried(facts["sni"])
    assert header.tls.alpn == carried(facts["alpn"])
    assert header.tls.client_cert is facts["client_cert"]
    assert header.tls.client_cert_verified is facts["client_cert"]


def test_haproxys_full_header_comes_out_field_by_field() -> None:
    header = parsed(HEADERS["haproxy_v2_full_client_cert"])
    assert header.transport == "TCP4"
    assert header.destination == ("127.0.0.1", 3304)
    assert header.crc32c == 0x496F0892
    assert header.unique_id == b"7F000001:C0A8_6B0342BF_0007"
    assert header.tls == TLSInfo(
        "TLSv1.3", "TLS_AES_256_GCM_SHA384", "mail.example.com", "smtp", True, True, "client.example.net"
    )
    assert header.ssl is not None
    assert (header.ssl.client, header.ssl.verify) == (7, 0)
    assert (header.ssl.sig_alg, header.ssl.key_alg) == ("RSA-SHA256", "RSA2048")


def test_a_recorded_health_check_is_local_and_says_nothing() -> None:
    assert parsed(HEADERS["haproxy_v2_health_check_local"]) == ProxyHeader(2, "LOCAL", "UNKNOWN", None, None, ())


@pytest.mark.parametrize("name", HEADERS)
def test_every_proper_beginning_of_a_header_needs_more(name: str) -> None:
    raw = HEADERS[name]
    assert [length for length in range(len(raw)) if parse(raw[:length]) is not None] == []


@pytest.mark.parametrize("name", HEADERS)
def test_any_one_byte_changed_parses_or_raises_proxy_protocol_error(name: str) -> None:
    raw = HEADERS[name]
    for place in range(len(raw)):
        for change in range(1, 256):
            outcome(raw[:place] + bytes([raw[place] ^ change]) + raw[place + 1 :])


@pytest.mark.parametrize("name", CHECKSUMMED)
def test_any_one_byte_changed_under_a_checksum_is_an_error(name: str) -> None:
    raw = HEADERS[name]
    crc_type = 28
    for place in range(16, len(raw)):
        for change in range(1, 256):
            broken = raw[:place] + bytes([raw[place] ^ change]) + raw[place + 1 :]
            if place == crc_type:
                # The one byte that no checksum can guard: it says that there is a checksum.
                header = outcome(broken)
                assert header is None or header.crc32c is None
            else:
                with pytest.raises(ProxyProtocolError):
                    parse(broken)


def test_there_are_recorded_headers_with_a_checksum() -> None:
    assert len(CHECKSUMMED) == 3


# Writing


ENDPOINTS: dict[str, tuple[pp.Endpoint, pp.Endpoint]] = {
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


@pytest.mark.parametrize("transport", ["TCP4", "TCP6"])
def test_what_version_1_writes_it_reads(transport: str) -> None:
    header = ProxyHeader(1, "PROXY", transport, *ENDPOINTS[transport])
    assert parsed(header.to_bytes()) == header


def test_version_1_is_the_line_of_the_specification() -> None:
    header = ProxyHeader(1, "PROXY", "TCP4", ("192.168.0.1", 56324), ("192.168.0.11", 443))
    assert header.to_bytes() == b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"


@pytest.mark.parametrize("transport", ["UNIX", "UNIX_DGRAM", "UDP4", "UDP6", "UNKNOWN"])
def test_version_1_says_unknown_for_what_it_has_no_word_for(transport: str) -> None:
    assert ProxyHeader(1, "PROXY", transport, *ENDPOINTS[transport]).to_bytes() == b"PROXY UNKNOWN\r\n"
    assert ProxyHeader(1, "LOCAL").to_bytes() == b"PROXY UNKNOWN\r\n"


def test_local_is_written_without_addresses_but_with_a_checksum() -> None:
    raw = ProxyHeader(2, "LOCAL", "TCP4", *ENDPOINTS["TCP4"]).to_bytes()
    assert raw[:19] == v2(command=0x20, family=0, length=7) + b"\x03\x00\x04"
    assert len(raw) == 23
    assert int.from_bytes(raw[-4:], "big") == pp.crc32c(raw[:-4] + bytes(4))
    assert parsed(raw) == ProxyHeader(version=2, command="LOCAL")


def test_a_checksum_among_the_tlvs_is_made_anew_at_the_end() -> None:
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
def test_what_is_known_of_tls_survives_the_journey(tls: TLSInfo) -> None:
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
def test_what_cannot_be_written_is_a_value_error(header: ProxyHeader, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        header.to_bytes()


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


# The checksum


def _bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_crc32c_has_the_value_that_everybody_gets() -> None:
    assert pp.crc32c(b"123456789") == 0xE3069283
    assert pp.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720 B.4
    assert pp.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert pp.crc32c(bytes(range(32))) == 0x46DD794E


def test_crc32c_is_right_at_every_length_at_which_it_folds() -> None:
    numbers = random.Random(5)
    for length in [*range(4, 300), 511, 1024, 2047, 4096]:
        data = numbers.randbytes(length)
        assert pp.crc32c(data) == _bit_by_bit(data)


# Noise


def test_noise_is_refused_or_waited_for() -> None:
    numbers = random.Random(6)
    for _ in range(30_000):
        noise = numbers.randbytes(numbers.randrange(80))
        outcome(noise)
        outcome(SIGNATURE + noise)
        outcome(v2(TCP4 + noise))
        outcome(v2(TCP4 + tlv(pp.PP2_TYPE_SSL, noise)))
        outcome(b"PROXY TCP6 " + bytes(numbers.choices(b"0123456789abcdef:.: \r\n", k=numbers.randrange(60))))


def test_headers_bent_in_several_places_are_refused_or_parse() -> None:
    numbers = random.Random(7)
    headers = sorted(HEADERS.values())
    for _ in range(50_000):
        bent = bytearray(numbers.choice(headers))
        for _ in range(numbers.randrange(1, 6)):
            place = numbers.randrange(len(bent))
            match numbers.randrange(3):
                case 0:
                    bent[place] = numbers.randrange(256)
                case 1:
                    del bent[place : place + numbers.randrange(1, 9)]
                    bent += b"\r\n"
                case _:
                    bent[place:place] = numbers.choice(headers)[:place]
        outcome(bytes(bent))


def test_once_refused_is_refused_whatever_follows() -> None:
    numbers = random.Random(8)
    headers = sorted(HEADERS.values())
    for _ in range(1_500):
        bent = bytearray(numbers.choice(headers))
        bent[numbers.randrange(len(bent))] = numbers.choice(b"\x00\r\n 019:.Zf\xff")
        whole = bytes(bent) + b"EHLO x\r\n"
        refused = False
        for length in range(len(whole) + 1):
            try:
                found = parse(whole[:length])
            except ProxyProtocolError:
                refused = True
                continue
            assert not refused
            if found is not None:
                break
