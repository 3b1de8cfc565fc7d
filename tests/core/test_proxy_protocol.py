"""fumi_core.proxy_protocol against recorded headers, and bytes that lie."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fumi_core import proxy_protocol as pp
from fumi_core.proxy_protocol import ProxyHeader, ProxyProtocolError, TLSInfo, parse
from tests.core.proxy_headers import CHECKSUMMED, FACTS, HEADERS, SIGNATURE, TCP4, outcome, parsed, tlv, v2

# Headers recorded from HAProxy, stunnel, nginx and hitch


@pytest.mark.parametrize("name", HEADERS)
def test_a_recorded_header_is_read_whole_and_nothing_after_it(name: str) -> None:
    for behind in (b"", b"EHLO x\r\n", b"\x00", b"\xff" * 5000):
        found = parse(HEADERS[name] + behind)
        assert found is not None
        assert found[1] == len(HEADERS[name])


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_of_a_recorded_header_is_parsed(name: str) -> None:
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


def test_once_invalid_a_header_stays_invalid_whatever_follows() -> None:
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
