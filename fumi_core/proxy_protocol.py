"""The PROXY protocol, versions 1 and 2, in both directions: bytes ⇄ ProxyHeader.

Specification: HAProxy's doc/proxy-protocol.txt. Section 2.1 is the text line, 2.2 the binary header, 2.2.1 to 2.2.7 its
TLVs; RFC 4960 appendix B is the checksum. Sans-IO: `parse` takes the bytes that have arrived so far; this module does not read,
write, wait or log. The caller decides whether to expect a header, and from whom (section 2 forbids guessing): a header that is
parsed here is trusted.

The receiver is strict, because a half-understood header is a client address that somebody else chose. Where the specification
leaves a choice, these are the choices:

- LOCAL: the whole block after the length is discarded unread, the family byte and a checksum included (2.2: the receiver "must
  accept this connection as valid and … discard the protocol block"). It has no addresses and no TLVs.
- Family and protocol UNSPEC (0x00): transport UNKNOWN, no addresses. Since such a header has no address block, everything after
  the length is TLVs, as HAProxy writes it, and must follow the same rules. A family byte that is not among the seven of section
  2.2 is an error, the half-unspecified ones (0x01, 0x10 …) included.
- UNIQUE_ID is at most 128 bytes (2.2.5), CRC32C appears at most once; of other repeated TLVs the first one counts.
- Text in TLVs is UTF-8. A client chooses its SNI and the name in its certificate, so text can contain any characters, control
  characters too; bytes that are not UTF-8 become `\\xNN`, never an exception.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple

from fumi_core.crc32c import crc32c

PP2_TYPE_ALPN = 0x01
PP2_TYPE_AUTHORITY = 0x02
PP2_TYPE_CRC32C = 0x03
PP2_TYPE_NOOP = 0x04
PP2_TYPE_UNIQUE_ID = 0x05
PP2_TYPE_SSL = 0x20
PP2_SUBTYPE_SSL_VERSION = 0x21
PP2_SUBTYPE_SSL_CN = 0x22
PP2_SUBTYPE_SSL_CIPHER = 0x23
PP2_SUBTYPE_SSL_SIG_ALG = 0x24
PP2_SUBTYPE_SSL_KEY_ALG = 0x25
PP2_SUBTYPE_SSL_GROUP = 0x26
PP2_SUBTYPE_SSL_SIG_SCHEME = 0x27
PP2_SUBTYPE_SSL_CLIENT_CERT = 0x28
PP2_TYPE_NETNS = 0x30
# 0xE0 to 0xEF are application-specific, and kept raw: 0xE0 is Google's, 0xEA Amazon's, 0xEE Azure's.

PP2_CLIENT_SSL = 0x01
PP2_CLIENT_CERT_CONN = 0x02
PP2_CLIENT_CERT_SESS = 0x04

V1_MAX_LENGTH = 107
V2_MAX_LENGTH = 4096  # the format allows 65,551; no sender needs that much, and a receiver has to buffer it
UNIQUE_ID_MAX_LENGTH = 128

Endpoint = tuple[str, int] | str
"""A host and a port, or the path of a Unix socket, which is empty for a socket without a name."""
TLV = tuple[int, bytes]

_V1_SIGNATURE = b"PROXY "
_V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_FIXED = struct.Struct(">12sBBH")
_FIXED_LENGTH = _FIXED.size
_LOCAL, _PROXY = 0x20, 0x21

_UNIX_PATH_LENGTH = 108
_FAMILIES = {
    0x00: ("UNKNOWN", 0),
    0x11: ("TCP4", 12),
    0x12: ("UDP4", 12),
    0x21: ("TCP6", 36),
    0x22: ("UDP6", 36),
    0x31: ("UNIX", 2 * _UNIX_PATH_LENGTH),
    0x32: ("UNIX_DGRAM", 2 * _UNIX_PATH_LENGTH),
}
_FAMILY_BYTES = {transport: byte for byte, (transport, _) in _FAMILIES.items()}
_INET = {
    "TCP4": (AF_INET, struct.Struct(">4s4sHH")),
    "UDP4": (AF_INET, struct.Struct(">4s4sHH")),
    "TCP6": (AF_INET6, struct.Struct(">16s16sHH")),
    "UDP6": (AF_INET6, struct.Struct(">16s16sHH")),
}
_V1_FAMILIES = {b"TCP4": AF_INET, b"TCP6": AF_INET6}
_TLV_HEAD = struct.Struct(">BH")
_SSL_HEAD = struct.Struct(">BI")
_CRC32C_HEAD = _TLV_HEAD.pack(PP2_TYPE_CRC32C, 4)


class ProxyProtocolError(ValueError):
    """The bytes are not a PROXY header and cannot become one. The text says what is wrong and quotes no bytes."""


@dataclass(frozen=True, slots=True)
class TLSInfo:
    """The client's TLS session; None is unknown. The names are OpenSSL's ("TLSv1.3").

    `client_cert` tells that the client presented a certificate, on this connection or earlier in its TLS session;
    `client_cert_verified` that the certificate was verified successfully. Otherwise `client_cn` is only a claim.
    """

    version: str | None = None
    cipher: str | None = None
    sni: str | None = None
    alpn: str | None = None
    client_cert: bool = False
    client_cert_verified: bool = False
    client_cn: str | None = None


class SSLValue(NamedTuple):
    """The value of a PP2_TYPE_SSL TLV (section 2.2.6): PP2_CLIENT_… flags, the verify result (0 is success), the TLVs inside.

    A property is the text of one of these TLVs, None without it. `sig_alg`, `key_alg` and `sig_scheme` are those of the proxy's
    certificate, not of the client's.
    """

    client: int
    verify: int
    tlvs: tuple[TLV, ...] = ()

    @classmethod
    def from_bytes(cls, value: bytes) -> SSLValue:
        """Decode the value. Raises ProxyProtocolError."""
        tlvs = _split_ssl(value, 0, len(value))
        client, verify = _SSL_HEAD.unpack_from(value)
        return cls(client, verify, tlvs)

    def to_bytes(self) -> bytes:
        """Encode the value. Raises ValueError for a TLV that is too long."""
        return _SSL_HEAD.pack(self.client, self.verify) + b"".join([_tlv(kind, value) for kind, value in self.tlvs])

    @property
    def version(self) -> str | None:
        """The TLS version, such as "TLSv1.3"."""
        return _text(self.tlvs, PP2_SUBTYPE_SSL_VERSION)

    @property
    def cn(self) -> str | None:
        """The common name of the client's certificate."""
        return _text(self.tlvs, PP2_SUBTYPE_SSL_CN)

    @property
    def cipher(self) -> str | None:
        """The cipher, such as "TLS_AES_256_GCM_SHA384"."""
        return _text(self.tlvs, PP2_SUBTYPE_SSL_CIPHER)

    @property
    def sig_alg(self) -> str | None:
        """The algorithm that signed the certificate, such as "RSA-SHA256"."""
        return _text(self.tlvs, PP2_SUBTYPE_SSL_SIG_ALG)

    @property
    def key_alg(self) -> str | None:
        """The kind of the certificate's key, such as "RSA2048"."""
        return _text(self.tlvs, PP2_SUBTYPE_SSL_KEY_ALG)

    @property
    def group(self) -> str | None:
        """The group of the key exchange, such as "secp256r1"."""
        return _text(self.tlvs, PP2_SUBTYPE_SSL_GROUP)

    @property
    def sig_scheme(self) -> str | None:
        """The algorithm that signed the handshake, such as "rsa_pss_rsae_sha256"."""
        return _text(self.tlvs, PP2_SUBTYPE_SSL_SIG_SCHEME)

    @property
    def client_cert(self) -> bytes | None:
        """The client's certificate, DER."""
        return _first(self.tlvs, PP2_SUBTYPE_SSL_CLIENT_CERT)


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """One header. `version` 1 or 2; `command` "PROXY" or "LOCAL".

    `transport`: "TCP4", "TCP6", "UNIX", for datagrams "UDP4", "UDP6", "UNIX_DGRAM"; "UNKNOWN" when the sender could not
    say. `source` is the client and `destination` what it connected to: `(address, port)`, IPv6 compressed and in lower
    case; for Unix sockets the path as `os.fsdecode` gives it, an abstract name beginning with a NUL, "" for a socket
    without a name; None when unknown. `tlvs`: `(type, value)` in the order of sending, checksum and unknown types included.
    """

    version: int
    command: str
    transport: str = "UNKNOWN"
    source: Endpoint | None = None
    destination: Endpoint | None = None
    tlvs: tuple[TLV, ...] = ()

    @property
    def alpn(self) -> str | None:
        """The negotiated application protocol (section 2.2.1)."""
        return _text(self.tlvs, PP2_TYPE_ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client requested: with TLS its SNI (section 2.2.2)."""
        return _text(self.tlvs, PP2_TYPE_AUTHORITY)

    @property
    def crc32c(self) -> int | None:
        """The checksum of the header (section 2.2.3)."""
        value = _first(self.tlvs, PP2_TYPE_CRC32C)
        return None if value is None else int.from_bytes(value, "big")

    @property
    def noop(self) -> bytes | None:
        """Padding without a meaning (section 2.2.4)."""
        return _first(self.tlvs, PP2_TYPE_NOOP)

    @property
    def unique_id(self) -> bytes | None:
        """The connection's ID, at most 128 bytes (section 2.2.5)."""
        return _first(self.tlvs, PP2_TYPE_UNIQUE_ID)

    @property
    def netns(self) -> str | None:
        """The network namespace (section 2.2.7)."""
        return _text(self.tlvs, PP2_TYPE_NETNS)

    @property
    def ssl(self) -> SSLValue | None:
        """The SSL TLV (section 2.2.6). Raises ProxyProtocolError for a malformed one, which `parse` never returns."""
        value = _first(self.tlvs, PP2_TYPE_SSL)
        return None if value is None else SSLValue.from_bytes(value)

    @property
    def tls(self) -> TLSInfo | None:
        """The client's TLS session; None unless the SSL TLV has PP2_CLIENT_SSL: the TLV alone does not say that there was TLS."""
        ssl = self.ssl
        if ssl is None or not ssl.client & PP2_CLIENT_SSL:
            return None
        presented = bool(ssl.client & (PP2_CLIENT_CERT_CONN | PP2_CLIENT_CERT_SESS))
        return TLSInfo(
            version=ssl.version or None,
            cipher=ssl.cipher or None,
            sni=self.authority,
            alpn=self.alpn,
            client_cert=presented,
            client_cert_verified=presented and ssl.verify == 0,
            client_cn=ssl.cn if presented else None,
        )

    def to_bytes(self) -> bytes:
        """Encode the header; `parse` decodes it. Raises ValueError for a header that cannot be encoded.

        Version 2 always ends with a CRC32C TLV: one that is already among `tlvs` is removed and computed again at the end. LOCAL
        and UNKNOWN are written without addresses. Version 1 has no LOCAL, no Unix sockets and no datagrams; these are written as
        "PROXY UNKNOWN", as section 2.1 requires, which also makes the receiver use the connection's own addresses. In version 1
        TLVs are a ValueError. An IPv6 scope ("%eth0") cannot be encoded and is left out.
        """
        if self.command not in ("PROXY", "LOCAL") or self.transport not in _FAMILY_BYTES:
            raise ValueError(f"unknown command or transport: {self.command!r}, {self.transport!r}")
        if self.version == 2 and self.command == "LOCAL":
            return _v2_to_bytes(_LOCAL, 0x00, b"", encode_tlvs(self.tlvs))
        if self.version == 2:
            return v2_header(self.transport, self.source, self.destination, encode_tlvs(self.tlvs))
        if self.version == 1:
            return _v1_to_bytes(self)
        raise ValueError(f"unknown version of the PROXY protocol: {self.version!r}")


def parse(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Parse the header at the beginning of *data*; return it and its length in bytes, or None while more bytes are needed.

    Raises ProxyProtocolError as soon as no further byte could make it valid. At most 107 bytes (version 1) or 4096 (version 2)
    are examined, so None is never returned for more than that.
    """
    if data.startswith(_V2_SIGNATURE):
        return _parse_v2(data)
    if data.startswith(_V1_SIGNATURE):
        return _parse_v1(data)
    if _V2_SIGNATURE.startswith(data) or _V1_SIGNATURE.startswith(data):
        return None
    raise ProxyProtocolError("no PROXY signature")


def unique_id_text(unique_id: bytes) -> str:
    """A UNIQUE_ID as text for logs: unchanged if it is printable ASCII without spaces, else in hex."""
    text = unique_id.decode("latin-1")
    return text if text.isascii() and text.isprintable() and " " not in text else unique_id.hex()


def tls_tlvs(tls: TLSInfo, resumed: bool = False) -> tuple[TLV, ...]:
    """The TLVs that describe *tls* to a receiver: SSL, and AUTHORITY and ALPN where known.

    A client certificate sets …_CERT_CONN and …_CERT_SESS, or …_CERT_SESS alone when the session is *resumed*: then it was
    sent on an earlier connection.
    """
    client = PP2_CLIENT_SSL
    inside = [(PP2_SUBTYPE_SSL_VERSION, tls.version), (PP2_SUBTYPE_SSL_CIPHER, tls.cipher)]
    if tls.client_cert:
        client |= PP2_CLIENT_CERT_SESS if resumed else PP2_CLIENT_CERT_CONN | PP2_CLIENT_CERT_SESS
        inside.append((PP2_SUBTYPE_SSL_CN, tls.client_cn))
    # "zero if the client presented a certificate and it was successfully verified, and non-zero otherwise"
    verify = 0 if tls.client_cert and tls.client_cert_verified else 1
    ssl = SSLValue(client, verify, _encoded(inside))
    return (PP2_TYPE_SSL, ssl.to_bytes()), *_encoded([(PP2_TYPE_AUTHORITY, tls.sni), (PP2_TYPE_ALPN, tls.alpn)])


# Section 2.1: version 1, a line of text.

# If the beginning of an address or a port can be completed at all, one of these completes it.
_V1_TAILS = (b"", b"0", b":", b"::", b".0", b"0.0", b".0.0", b"0.0.0", b".0.0.0", b"0.0.0.0")


def _parse_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    end = data.find(b"\r\n", 0, V1_MAX_LENGTH)
    if end >= 0:
        return _v1_line(data[:end]), end + 2
    if not any(_is_v1(data + ending) for ending in _v1_endings(data)):
        raise ProxyProtocolError("malformed version 1 line")
    return None


def _v1_line(line: bytes) -> ProxyHeader:
    """Parse *line*, which is given without its CRLF."""
    words = line[len(_V1_SIGNATURE) :].split(b" ")
    if words[0] == b"UNKNOWN":
        if b"\r" in line or b"\n" in line:
            raise ProxyProtocolError("bare CR or LF in a version 1 line")
        return ProxyHeader(1, "PROXY")
    family = _V1_FAMILIES.get(words[0])
    if family is None:
        raise ProxyProtocolError("unknown protocol in a version 1 line")
    if len(words) != 5:
        raise ProxyProtocolError("a version 1 line has two addresses and two ports, separated by single spaces")
    source = _v1_address(family, words[1]), _v1_port(words[3])
    destination = _v1_address(family, words[2]), _v1_port(words[4])
    return ProxyHeader(1, "PROXY", words[0].decode(), source, destination)


def _v1_address(family: int, word: bytes) -> str:
    # inet_pton is as strict as the specification (no leading zeroes, no scope), with one exception that senders need: it accepts
    # the dotted form ::ffff:192.0.2.1, which stunnel and others send from a socket that serves both families. Some send the IPv4
    # address itself, under TCP6 and beside an IPv6 address, with the same meaning.
    if family == AF_INET6 and b":" not in word:
        return "::ffff:" + _v1_address(AF_INET, word)
    try:
        return inet_ntop(family, inet_pton(family, word.decode("ascii")))
    except (OSError, ValueError) as error:
        raise ProxyProtocolError("malformed address in a version 1 line") from error


def _v1_port(word: bytes) -> int:
    if not word.isdigit() or len(word) > 5 or (word[0] == 0x30 and len(word) > 1) or int(word) > 65535:
        raise ProxyProtocolError("malformed port in a version 1 line")
    return int(word)


def _v1_endings(data: bytes) -> list[bytes]:
    """Possible continuations of *data*, shortest first; if none of them makes it a valid line, nothing does."""
    if data.endswith(b"\r"):
        return [b"\n"]
    words = data[len(_V1_SIGNATURE) :].split(b" ")
    if words[0] == b"UNKNOWN":
        return [b"\r\n"]
    endings = []
    for name, zero in ((b"TCP4", b"0.0.0.0"), (b"TCP6", b"::")):
        if len(words) == 1 and name.startswith(words[0]):
            endings.append(b" ".join((name[len(words[0]) :], zero, zero, b"0", b"0\r\n")))
        elif name == words[0]:
            rest = b" ".join((b"", zero, b"0", b"0")[len(words) - 1 :])
            endings += [tail + (b" " + rest if rest else b"") + b"\r\n" for tail in _V1_TAILS]
    if len(words) == 1 and b"UNKNOWN".startswith(words[0]):
        endings.append(b"UNKNOWN"[len(words[0]) :] + b"\r\n")
    return endings


def _is_v1(data: bytes) -> bool:
    try:
        _v1_line(data[:-2])
    except ProxyProtocolError:
        return False
    return len(data) <= V1_MAX_LENGTH


def _v1_to_bytes(header: ProxyHeader) -> bytes:
    if header.tlvs:
        raise ValueError("version 1 of the PROXY protocol carries no TLVs")
    if header.command == "LOCAL" or header.transport not in ("TCP4", "TCP6"):
        return b"PROXY UNKNOWN\r\n"
    family, layout = _INET[header.transport]
    source, destination, source_port, destination_port = layout.unpack(
        _addresses_to_bytes(header.transport, header.source, header.destination)
    )
    # Converted to binary and back, so that only an address can get into the line.
    addresses = f"{inet_ntop(family, source)} {inet_ntop(family, destination)}"
    return f"PROXY {header.transport} {addresses} {source_port} {destination_port}\r\n".encode("ascii")


# Section 2.2: version 2, binary.

# The last four bytes of the fixed part, with the most acceptable values: if a header whose missing bytes are filled in from these
# is invalid, it can never become valid. 0x__F0 is the greatest low byte within the limit, and enough for any family.
_V2_LENIENT = b"\x20\x00\x00\xf0"


def _parse_v2(data: bytes) -> tuple[ProxyHeader, int] | None:
    size = len(data)
    if size < _FIXED_LENGTH:
        _v2_fixed(data + _V2_LENIENT[size - len(_V2_SIGNATURE) :])
        return None
    transport, start, total = _v2_fixed(data)
    if size < total:
        # Only a read beyond the received bytes raises IndexError, and that is not an error yet.
        with suppress(IndexError):
            if transport is not None:
                _split_tlvs(data, start, total)
        return None
    if transport is None:
        return ProxyHeader(2, "LOCAL"), total
    tlvs, crc_at = _split_tlvs(data, start, total)
    if crc_at:
        after = crc_at + 4
        if crc32c(data[:crc_at] + bytes(4) + data[after:total]) != int.from_bytes(data[crc_at:after], "big"):
            raise ProxyProtocolError("wrong CRC32C")
    source, destination = _v2_addresses(transport, data)
    return ProxyHeader(2, "PROXY", transport, source, destination, tlvs), total


def _v2_fixed(data: bytes) -> tuple[str | None, int, int]:
    """Return the transport (None for LOCAL), the offset of the TLVs, and the whole length."""
    _, version_command, family, length = _FIXED.unpack_from(data)
    total = _FIXED_LENGTH + length
    if total > V2_MAX_LENGTH:
        raise ProxyProtocolError("header longer than 4096 bytes")
    if version_command == _LOCAL:
        return None, total, total
    if version_command != _PROXY:
        raise ProxyProtocolError("unknown command" if version_command >> 4 == 2 else "unknown version")
    if family not in _FAMILIES:
        raise ProxyProtocolError("unknown address family or transport protocol")
    transport, addresses = _FAMILIES[family]
    if length < addresses:
        raise ProxyProtocolError("length too short for the addresses")
    return transport, _FIXED_LENGTH + addresses, total


def _split_tlvs(data: bytes, offset: int, end: int) -> tuple[tuple[TLV, ...], int]:
    """Return the TLVs between *offset* and *end*, and the offset of CRC32C's value, or 0.

    Only lengths are checked, never values, so this also works for an incomplete header; it then raises IndexError if the bytes
    received so far are valid.
    """
    tlvs = []
    crc_at = 0
    while offset < end:
        value = offset + 3
        if value > end:
            raise ProxyProtocolError("TLV past the end of the header")
        kind = data[offset]
        stop = value + ((data[offset + 1] << 8) | data[offset + 2])
        if stop > end:
            raise ProxyProtocolError("TLV past the end of the header")
        if kind == PP2_TYPE_CRC32C:
            if stop - value != 4 or crc_at:
                raise ProxyProtocolError("CRC32C twice, or not of 4 bytes")
            crc_at = value
        elif kind == PP2_TYPE_SSL:
            _split_ssl(data, value, stop)
        elif kind == PP2_TYPE_UNIQUE_ID and stop - value > UNIQUE_ID_MAX_LENGTH:
            raise ProxyProtocolError("UNIQUE_ID longer than 128 bytes")
        tlvs.append((kind, data[value:stop]))
        offset = stop
    return tuple(tlvs), crc_at


def _split_ssl(data: bytes, offset: int, end: int) -> tuple[TLV, ...]:
    """The TLVs inside the SSL TLV whose value lies between *offset* and *end*."""
    tlvs = []
    offset += _SSL_HEAD.size
    if offset > end:
        raise ProxyProtocolError("SSL TLV shorter than 5 bytes")
    while offset < end:
        value = offset + 3
        if value > end:
            raise ProxyProtocolError("TLV past the end of the SSL TLV")
        stop = value + ((data[offset + 1] << 8) | data[offset + 2])
        if stop > end:
            raise ProxyProtocolError("TLV past the end of the SSL TLV")
        tlvs.append((data[offset], data[value:stop]))
        offset = stop
    return tuple(tlvs)


def _v2_addresses(transport: str, data: bytes) -> tuple[Endpoint | None, Endpoint | None]:
    if transport in _INET:
        family, layout = _INET[transport]
        source, destination, source_port, destination_port = layout.unpack_from(data, _FIXED_LENGTH)
        return (inet_ntop(family, source), source_port), (inet_ntop(family, destination), destination_port)
    if transport == "UNKNOWN":
        return None, None
    middle = _FIXED_LENGTH + _UNIX_PATH_LENGTH
    return _unix_path(data[_FIXED_LENGTH:middle]), _unix_path(data[middle : middle + _UNIX_PATH_LENGTH])


def _unix_path(field: bytes) -> str:
    if field[0]:
        return os.fsdecode(field.partition(b"\0")[0])
    # An abstract name may contain NULs, and its length is not encoded: trailing NULs count as padding.
    return os.fsdecode(field.rstrip(b"\0"))


def v2_header(transport: str, source: Endpoint | None, destination: Endpoint | None, tlvs: bytes) -> bytes:
    """The bytes of ``ProxyHeader(2, "PROXY", …)``, whose TLVs are encoded already, by ``encode_tlvs``. Raises ValueError."""
    return _v2_to_bytes(_PROXY, _FAMILY_BYTES[transport], _addresses_to_bytes(transport, source, destination), tlvs)


def encode_tlvs(tlvs: tuple[TLV, ...]) -> bytes:
    """Encode all TLVs but CRC32C, and check them by the receiver's rules. Raises ValueError."""
    parts = []
    for kind, value in tlvs:
        if kind == PP2_TYPE_SSL:
            _split_ssl(value, 0, len(value))
        elif kind == PP2_TYPE_UNIQUE_ID and len(value) > UNIQUE_ID_MAX_LENGTH:
            raise ValueError("UNIQUE_ID longer than 128 bytes")
        if kind != PP2_TYPE_CRC32C:
            parts.append(_tlv(kind, value))
    return b"".join(parts)


def _v2_to_bytes(version_command: int, family: int, addresses: bytes, tlvs: bytes) -> bytes:
    length = len(addresses) + len(tlvs) + len(_CRC32C_HEAD) + 4
    if _FIXED_LENGTH + length > V2_MAX_LENGTH:
        raise ValueError("PROXY header longer than 4096 bytes")
    head = _FIXED.pack(_V2_SIGNATURE, version_command, family, length) + addresses + tlvs + _CRC32C_HEAD
    return head + crc32c(head + bytes(4)).to_bytes(4, "big")


def _addresses_to_bytes(transport: str, source: Endpoint | None, destination: Endpoint | None) -> bytes:
    if transport == "UNKNOWN":
        return b""
    if transport not in _INET:
        return _unix_field(source) + _unix_field(destination)
    if not isinstance(source, tuple) or not isinstance(destination, tuple):
        raise ValueError(f"{transport} needs an address and a port for source and destination")
    family, layout = _INET[transport]
    try:
        # An IPv6 scope is left out.
        hosts = inet_pton(family, source[0].partition("%")[0]), inet_pton(family, destination[0].partition("%")[0])
        return layout.pack(*hosts, source[1], destination[1])
    except OSError as error:
        raise ValueError(f"not an address of that family: {source[0]!r} or {destination[0]!r}") from error
    except struct.error as error:
        raise ValueError(f"port out of range: {source[1]}, {destination[1]}") from error


def _unix_field(path: Endpoint | None) -> bytes:
    if not isinstance(path, str):
        raise ValueError("UNIX needs a path for source and destination")
    field = os.fsencode(path)
    if len(field) > _UNIX_PATH_LENGTH:
        raise ValueError("path longer than 108 bytes")
    if field.endswith(b"\0") or (b"\0" in field and field[0]):
        raise ValueError("NUL in a path, or at the end of an abstract name")
    return field.ljust(_UNIX_PATH_LENGTH, b"\0")


# Section 2.2: TLVs.


def _tlv(kind: int, value: bytes) -> bytes:
    try:
        return _TLV_HEAD.pack(kind, len(value)) + value
    except struct.error as error:
        raise ValueError(f"TLV type {kind!r} or length {len(value)} out of range") from error


def _first(tlvs: tuple[TLV, ...], kind: int) -> bytes | None:
    for found, value in tlvs:
        if found == kind:
            return value
    return None


def _text(tlvs: tuple[TLV, ...], kind: int) -> str | None:
    value = _first(tlvs, kind)
    return None if value is None else value.decode("utf-8", "backslashreplace")


def _encoded(texts: list[tuple[int, str | None]]) -> tuple[TLV, ...]:
    return tuple([(kind, text.encode("utf-8", "backslashreplace")) for kind, text in texts if text is not None])
