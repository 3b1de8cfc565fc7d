"""Recorded PROXY headers, headers made by hand, and what fumi_core.proxy_protocol makes of them."""

from __future__ import annotations

import json
from pathlib import Path

from fumi_core.proxy_protocol import ProxyHeader, ProxyProtocolError, parse

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
