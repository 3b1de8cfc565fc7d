"""Reads PEM text (RFC 7468) into a certificate that was tested and decoded, or into an error of one line.

Each file is read once, so that the certificate that was tested is the one that is served. OpenSSL loads certificates from files
only: it gets anonymous files in memory, so a key that was passed as text is never written to a disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fumi_core.runtime.files import NotRegularError, read_file

Source = str | bytes | os.PathLike[str]
"""PEM text, or the path of a file that holds it."""

_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, which ssl.VerifyFlags lacks: an expired certificate must be decoded too."""
_BEGIN = b"-----BEGIN CERTIFICATE-----"
_END = b"-----END CERTIFICATE-----"
_GLUED = b"----------BEGIN "
"""The end of one block and the beginning of the next on one line, as in joined files without a final line break."""
_BOM = b"\xef\xbb\xbf"
_TRACE = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )?CERTIFICATE-----")
"""The beginning of a certificate, even if it is incomplete or has an unsupported label such as TRUSTED CERTIFICATE."""
_AUTHORITY = re.compile(rb"\x06\x03\x55\x1d\x13(?:\x01\x01\xff)?\x04.\x30.\x01\x01\xff", re.DOTALL)
"""The extension basicConstraints (RFC 5280 §4.2.1.9) with cA TRUE, in DER: Python does not decode it."""
_PKCS12 = re.compile(rb"\x30(?:[\x00-\x80]|\x81.|\x82..|\x83...)\x02\x01\x03", re.DOTALL)
"""The beginning of a PFX (RFC 7292 §4), version 3, in DER or BER."""
_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")
_SOURCE_LINE = re.compile(r" \(_ssl\.c:\d+\)")
_ENCRYPTED = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: 4,ENCRYPTED", re.MULTILINE)


class CertificateError(Exception):
    """A certificate or key that cannot be used; the message is one line and names the file."""


class NoServer(CertificateError):
    """The file lacks a certificate or its key, or its certificate is not for TLS servers."""


class Pair(NamedTuple):
    """The sources of a certificate and of its key; ``key`` is None when ``cert`` holds the key too."""

    cert: Source
    key: Source | None = None

    def __str__(self) -> str:
        return label(self.cert)


class Authority(NamedTuple):
    """A CA certificate: its subject's common name or organization, and its validity in seconds since 1970."""

    subject: str
    not_before: float
    not_after: float

    def validity_problem(self, now: float) -> str | None:
        """Why it is not valid at ``now`` (seconds since 1970), or None."""
        if now > self.not_after:
            return f"the CA certificate {self.subject!r} expired on {date(self.not_after)}"
        if now < self.not_before:
            return f"the CA certificate {self.subject!r} is not valid before {date(self.not_before)}"
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """A tested certificate: its source, the names it is for, its validity in seconds since 1970.

    ``kind`` is RSA or ECDSA (which includes EdDSA); a client may support only one of them. ``authorities`` are the CA
    certificates that are sent with it. ``issuer`` is the common name or organization of who signed it. ``loaded`` is when it was
    read, in seconds since 1970.
    """

    pair: Pair
    names: tuple[str, ...]
    not_before: float
    not_after: float
    kind: str
    authorities: tuple[Authority, ...]
    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)
    issuer: str = ""
    loaded: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return self.names[0] if self.names else os.path.basename(str(self.pair))

    def validity_problem(self, now: float) -> str | None:
        """Why it is not valid at ``now`` (seconds since 1970), or None."""
        if now > self.not_after:
            return f"{self.pair}: the certificate expired on {date(self.not_after)}"
        if now < self.not_before:
            return f"{self.pair}: the certificate is not valid before {date(self.not_before)}"
        return None

    def chain_problems(self, now: float) -> list[str]:
        """A line for each CA certificate in the file that is not valid at ``now`` (seconds since 1970)."""
        return [f"{self.pair}: {problem}" for each in self.authorities if (problem := each.validity_problem(now))]

    def changes(self, now: float) -> list[float]:
        """The times from ``now`` on (seconds since 1970) at which it becomes valid and at which it expires."""
        return [self.not_before] * (self.not_before > now) + [self.not_after] * (self.not_after >= now)

    def give(self, context: ssl.SSLContext) -> None:
        """Load it into a context. Raises CertificateError when the context's policy forbids it."""
        try:
            _give(context, self.chain, self.key)
        except ssl.SSLError as error:
            raise _complaint(error, self.pair, self.chain) from None


def is_path(source: Source) -> bool:
    return not isinstance(source, bytes) and "-----BEGIN" not in os.fspath(source)


def label(source: Source) -> str:
    """The name of a source in messages."""
    return os.fspath(source) if not isinstance(source, bytes) and is_path(source) else "(PEM text)"


def holds_key(source: Source) -> bool:
    """Whether a source holds a private key. Raises CertificateError."""
    return bool(_KEY.search(_read(source, "certificate")))


def is_authority(source: Source) -> bool:
    """True when this is not a server certificate.

    The file's first certificate is a CA (as most self-signed ones are), or the file holds no certificate.
    """
    try:
        first = next(_certificates(_read(source, "certificate")), None)
        return first is None or _may_sign(first)
    except CertificateError as error:
        return isinstance(error, NoServer)


def authorities(source: Source, what: str = "client CA") -> str:
    """The certificates in a CA file, without any other text; ``what`` is its name in errors. Raises CertificateError."""
    found = list(_certificates(data := _read(source, what)))
    if not found:
        raise _without(source, data)
    _refuse_glued(source, data)
    return b"\n".join(found).decode("latin-1")


def authorities_in(text: str | bytes) -> tuple[Authority, ...]:
    """The CA certificates of a PEM text, without other certificates; () when OpenSSL cannot read the text."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=text if isinstance(text, str) else text.decode("ascii"))
    except (ssl.SSLError, ValueError):
        return ()
    found: list[dict[str, Any]] = context.get_ca_certs()
    return tuple(
        Authority(_last_part(each, "subject"), _seconds(each["notBefore"]), _seconds(each["notAfter"])) for each in found
    )


def load(pair: Pair, previous: Certificate | None = None, of_client: bool = False) -> Certificate:
    """Read a certificate chain and its key. Returns ``previous`` if neither has changed. Raises CertificateError.

    ``of_client``: the certificate is shown to servers, and not to clients.
    """
    chain = _read(pair.cert, "certificate")
    key = chain if pair.key is None else _read(pair.key, "key")
    if previous is not None and (previous.chain, previous.key) == (chain, key):
        return previous
    leaf = next(_certificates(chain), None)
    if leaf is None:
        raise _without(pair.cert, chain)
    _refuse_glued(pair.cert, chain)
    if pair.key is not None:
        _refuse_glued(pair.key, key)
    place = label(pair.cert if pair.key is None else pair.key)
    if _ENCRYPTED.search(key):
        raise CertificateError(f"{place}: the private key is encrypted; decrypt it with openssl pkey -in OLD -out NEW")
    if not _KEY.search(key):
        if conversion := _conversion(key, "pkey"):
            raise CertificateError(f"{place}: {conversion}")
        flags = "--backend-key" if of_client else "--key, or in a directory give it the same name with .key"
        raise NoServer(f"{place}: holds no private key" + (f"; name its file with {flags}" if pair.key is None else ""))
    try:
        facts, kind = _try_out(chain, key, leaf.decode("latin-1"), of_client)
        validity = _seconds(facts["notBefore"]), _seconds(facts["notAfter"])
        others = list(_certificates(chain))[1:]
        sent = authorities_in(b"\n".join(others))
        return Certificate(pair, _names(facts), *validity, kind, sent, chain, key, _last_part(facts, "issuer"))
    except ssl.SSLError as error:
        raise _complaint(error, pair, chain, of_client) from None
    except ValueError as error:
        raise CertificateError(f"{pair}: OpenSSL cannot read the certificate: {error}") from None


def _read(source: Source, what: str) -> bytes:
    if isinstance(source, bytes):
        return source
    if not is_path(source):
        return os.fspath(source).encode()
    try:
        return read_file(source).removeprefix(_BOM)
    except (OSError, ValueError) as error:
        detail = getattr(error, "strerror", None) or error
        kind = NoServer if isinstance(error, IsADirectoryError | NotRegularError) else CertificateError
        raise kind(f"{label(source)}: cannot read the {what}: {detail}") from None


def _certificates(data: bytes) -> Iterator[bytes]:
    """The certificates of a PEM text, without the text between them. The time is linear in the length of any text."""
    end = 0
    while (begin := data.find(_BEGIN, end)) >= 0 and (found := data.find(_END, begin)) >= 0:
        end = found + len(_END)
        yield data[begin:end]


def _refuse_glued(source: Source, data: bytes) -> None:
    """Raise CertificateError for joined lines: OpenSSL would skip the second block and report an error of the key in it."""
    if (at := data.find(_GLUED)) >= 0:
        line = data.count(b"\n", 0, at) + 1
        raise CertificateError(f"{label(source)}: line {line} has -----BEGIN after -----END; put a line break between them")


def _give(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    with _file(chain) as chain_path, _file(key) as key_path:
        context.load_cert_chain(chain_path, key_path, password=_no_passphrase)


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[str]:
    """The path of an anonymous file in memory that holds ``data``."""
    fd = os.memfd_create("pem")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _no_passphrase() -> str:
    # Without this, OpenSSL would prompt on the terminal, which a daemon does not have.
    raise ValueError("the private key is encrypted")


def _without(source: Source, data: bytes) -> CertificateError:
    """The error for a source without a certificate."""
    if conversion := _conversion(data, "x509"):
        return CertificateError(f"{label(source)}: {conversion}")
    # An incomplete certificate may be one that is being written.
    kind = CertificateError if _TRACE.search(data) else NoServer
    return kind(f"{label(source)}: holds no PEM certificate")


def _conversion(data: bytes, command: str) -> str | None:
    """How to convert data in another format to PEM with this openssl command, or None. DER begins with a SEQUENCE."""
    if _PKCS12.match(data):
        return "is PKCS#12 and not PEM; convert it with openssl pkcs12 -nodes -in OLD -out NEW"
    return f"is DER and not PEM; convert it with openssl {command} -inform DER -in OLD -out NEW" if data[:1] == b"\x30" else None


def _may_sign(certificate: bytes) -> bool:
    try:
        return bool(_AUTHORITY.search(ssl.PEM_cert_to_DER_cert(certificate.decode("latin-1"))))
    except ValueError:
        return False


def _complaint(error: ssl.SSLError, pair: Pair, chain: bytes, of_client: bool = False) -> CertificateError:
    key = label(pair.cert if pair.key is None else pair.key)
    reason = (error.reason or "").replace("_", " ").lower()
    if "mismatch" in reason or reason == "no certificate assigned":  # the latter when the key is of another kind
        found = list(_certificates(chain))
        swapped = len(found) > 1 and _may_sign(found[0])
        hint = ", whose first certificate is an authority's: the server's own must come first" if swapped else ""
        return CertificateError(f"{key}: the private key does not belong to the certificate in {pair}{hint}")
    if broken := _broken(chain):
        return CertificateError(f"{pair}: OpenSSL cannot read {broken}")
    if "pem lib" in str(error).lower():
        return CertificateError(f"{key}: OpenSSL cannot read the private key")
    verify = getattr(error, "verify_message", "")
    side = "client" if of_client else "server"
    return NoServer(f"{pair}: not usable by a TLS {side}: {verify or reason or _SOURCE_LINE.sub('', str(error))}")


def _broken(chain: bytes) -> str | None:
    """The first certificate of a file that OpenSSL cannot read, or None."""
    pieces = [_BEGIN + rest for rest in chain.split(_BEGIN)[1:]]
    for number, piece in enumerate(pieces, 1):
        found = next(_certificates(piece), None)
        try:
            if found is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode("ascii"))
                continue
        except (ssl.SSLError, ValueError):
            pass  # this is the certificate to report
        return "the certificate" if len(pieces) == 1 else f"certificate {number} of the {len(pieces)} in the file"
    return None


def _try_out(chain: bytes, key: bytes, leaf: str, of_client: bool) -> tuple[dict[str, Any], str]:
    """Decode a certificate, in getpeercert()'s form, and return it with its kind.

    Python decodes only a verified peer's certificate. So a server with this certificate does a handshake, in memory, with a
    client that trusts exactly this certificate, which also proves that key and certificate work. In TLS 1.2 the cipher names
    the kind. For a client's certificate, the client shows it, too, and the server verifies it.
    """
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.maximum_version = ssl.TLSVersion.TLSv1_2
    _give(server_context, chain, key)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    if of_client:
        client_context.verify_mode = ssl.CERT_NONE
        _give(client_context, chain, key)
        _trust_alone(server_context, leaf)
    else:
        _trust_alone(client_context, leaf)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(up, down, server_side=True)
    client = client_context.wrap_bio(down, up)
    for side in (client, server, client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    cipher = client.cipher()
    verifying = server if of_client else client
    return dict(verifying.getpeercert() or {}), "RSA" if cipher and "-RSA-" in cipher[0] else "ECDSA"


def _trust_alone(context: ssl.SSLContext, leaf: str) -> None:
    """Accept peers with exactly this certificate, whatever its validity."""
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
    context.load_verify_locations(cadata=leaf)


def _names(facts: dict[str, Any]) -> tuple[str, ...]:
    """The names of a certificate: its subjectAltName entries or, in old certificates, its common name (RFC 6125 §6.4.4)."""
    alternatives: Sequence[tuple[str, str]] = facts.get("subjectAltName", ())
    names = [value for kind, value in alternatives if kind in ("DNS", "IP Address")]
    return tuple(dict.fromkeys(name.lower() for name in names or common_names(facts)))


def common_names(facts: dict[str, Any]) -> list[str]:
    """The common names of a subject in getpeercert()'s form."""
    subject: Sequence[Sequence[tuple[str, str]]] = facts.get("subject", ())
    return [value for rdn in subject for kind, value in rdn if kind == "commonName"]


def _last_part(facts: dict[str, Any], whose: str) -> str:
    """The common name of a subject or issuer in getpeercert()'s form or, in old CA certificates, its last part."""
    parts: list[tuple[str, str]] = [part for rdn in facts.get(whose, ()) for part in rdn]
    names = [value for kind, value in parts if kind == "commonName"]
    return str([*(value for _, value in parts), *names][-1]) if parts else ""


def _seconds(asn1: object) -> float:
    return float(ssl.cert_time_to_seconds(str(asn1)))


def date(seconds: float) -> str:
    """A time (seconds since 1970) as text."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
