"""PROXY headers, recorded, made up and bent: a header, an error or a wish for more, and the same one however it arrives."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fumi_core.crc32c import crc32c
from fumi_core.proxy_protocol import (
    PP2_TYPE_CRC32C,
    V1_MAX_LENGTH,
    V2_MAX_LENGTH,
    Endpoint,
    ProxyHeader,
    ProxyProtocolError,
    SSLValue,
    parse,
)

from . import campaign, speech

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "proxy_headers.json").read_text())
RECORDED = [bytes.fromhex(vector["header_hex"]) for vector in VECTORS.values()]
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
PROPERTIES = ("tls", "ssl", "alpn", "authority", "unique_id", "crc32c", "noop", "netns")
PLACES: dict[str, tuple[Endpoint | None, Endpoint | None]] = {
    "TCP4": (("192.0.2.1", 1), ("198.51.100.2", 65535)),
    "UDP4": (("0.0.0.0", 0), ("255.255.255.255", 25)),
    "TCP6": (("2001:db8::1", 1), ("::ffff:192.0.2.1", 25)),
    "UDP6": (("::", 0), ("::1", 25)),
    "UNIX": ("/run/a", "\0abstract"),
    "UNIX_DGRAM": ("", "/" + "b" * 107),
    "UNKNOWN": (None, None),
}
LINES = (
    *(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65535\r\n", b"PROXY TCP6 2001:db8::1 ::1 0 25\r\n", b"PROXY UNKNOWN\r\n"),
    *(b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", b"PROXY TCP4 01.2.3.4 1.2.3.4 1 1\r\n", b"PROXY TCP6 ::ffff:1.2.3.4 :: 1 01\r\n"),
)  # fmt: skip
KINDS = (0x01, 0x02, 0x03, 0x04, 0x05, 0x20, 0x21, 0x30, 0xE0, 0xFF)


@dataclass(frozen=True)
class Header(campaign.Case):
    """Bytes at the beginning of a connection."""

    def check(self) -> None:
        whole = outcome(self.data)
        chance = Random(self.cut)
        ends = sorted(chance.randrange(len(self.data) + 1) for _ in range(5))
        if isinstance(whole, tuple):
            ends = sorted([*ends, whole[1] - 1, whole[1]])
            self._look_at(*whole)
        elif whole is None:
            limit = V2_MAX_LENGTH if self.data.startswith(SIGNATURE) else V1_MAX_LENGTH
            assert len(self.data) < limit, "more is wanted than may be"
        last: object = None
        for end in ends:
            now = outcome(self.data[:end])
            assert last is None or now == last, f"{now} instead of {last} with more bytes"
            last = now
        assert last is None or last == whole, f"{whole} instead of {last} with more bytes"

    def _look_at(self, header: ProxyHeader, used: int) -> None:
        assert 0 < used <= min(len(self.data), V2_MAX_LENGTH if header.version == 2 else V1_MAX_LENGTH)
        for name in PROPERTIES:
            getattr(header, name)
        assert header.tls is None or (header.ssl is not None and header.ssl.client & 1), "TLS that nobody spoke of"
        if header.version == 2 and used + 7 > V2_MAX_LENGTH:
            return  # no room for a checksum
        again = parse(header.to_bytes())
        assert again is not None
        assert facts(again[0]) == facts(header), "written and read again it is another"


def outcome(data: bytes) -> tuple[ProxyHeader, int] | str | None:
    try:
        return parse(data)
    except ProxyProtocolError:
        return "error"


def facts(header: ProxyHeader) -> tuple[object, ...]:
    tlvs = [tlv for tlv in header.tlvs if tlv[0] != PP2_TYPE_CRC32C]
    return header.version, header.command, header.transport, header.source, header.destination, tlvs


def header(chance: Random) -> Header:
    roll = chance.random()
    data = chance.choice(RECORDED) if roll < 0.4 else chance.choice(LINES) if roll < 0.55 else _made_up(chance)
    for _ in range(chance.choice((0, 1, 1, 2, 5))):
        data = _bent(chance, data)
    return Header(data + chance.choice((b"", b"", b"EHLO x\r\n", b"\0", b"x" * 5000)), chance.randrange(1 << 30))


def _made_up(chance: Random) -> bytes:
    transport = chance.choice(list(PLACES))
    source, destination = PLACES[transport]
    ssl = SSLValue(chance.randrange(8), chance.randrange(2), tuple((chance.choice(KINDS), _value(chance)) for _ in range(3)))
    tlvs = [(kind, _value(chance)) for kind in chance.choices((1, 2, 4, 5, 0x30, 0xE0), k=chance.randrange(4))]
    made = ProxyHeader(
        2, chance.choice(("PROXY",) * 5 + ("LOCAL",)), transport, source, destination, (*tlvs, (0x20, ssl.to_bytes()))
    )
    return made.to_bytes()


def _value(chance: Random) -> bytes:
    return chance.choice((b"", b"h2", b"TLSv1.3", b"mx.example", b"\xff\0", b"x" * 100, chance.randbytes(8)))


def _bent(chance: Random, data: bytes) -> bytes:
    how, at = chance.randrange(8), chance.randrange(len(data) + 1)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes((chance.randrange(256),)) + data[at + 1 :]
    if how == 2:
        return speech.bent(chance, data)
    if not data.startswith(SIGNATURE) or len(data) < 16:
        return data[:at] + chance.choice((b" ", b"\r", b"\n", b"0", b":", b".", b"-", b"65536")) + data[at:]
    if how == 3:
        return (
            data[:12]
            + bytes((chance.choice((0x20, 0x21, 0x11, 0x22)), chance.choice((0, 0x11, 0x12, 0x21, 0x31, 0x10))))
            + data[14:]
        )
    if how == 4:
        length = int.from_bytes(data[14:16], "big") + chance.choice((-300, -7, -1, 1, 3, 4000))
        return data[:14] + max(0, min(length, 65535)).to_bytes(2, "big") + data[16:]
    return _lengthened(data, _tlv(chance)) if how < 7 else _checked(data)


def _tlv(chance: Random) -> bytes:
    value = chance.choice((_value(chance), b"x" * chance.choice((127, 129, 2000, 3900))))
    return bytes((chance.choice(KINDS),)) + max(0, len(value) + chance.choice((0,) * 8 + (-1, 1, 300))).to_bytes(2, "big") + value


def _lengthened(data: bytes, tlv: bytes) -> bytes:
    length = int.from_bytes(data[14:16], "big") + len(tlv)
    return data[:14] + min(length, 65535).to_bytes(2, "big") + data[16:] + tlv


def _checked(data: bytes) -> bytes:
    """With a checksum at the end, right for what is before it."""
    data = _lengthened(data, b"\x03\0\4\0\0\0\0")
    return data[:-4] + crc32c(data).to_bytes(4, "big")


def test_every_header_is_one_thing_however_it_arrives() -> None:
    campaign.run("headers", 25, header)
