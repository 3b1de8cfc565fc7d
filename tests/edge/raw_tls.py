"""A TLS 1.3 client that writes its records itself after the handshake, such as no library writes (RFC 8446 §5)."""

from __future__ import annotations

import ctypes
import hmac
import re
import socket
import ssl
from pathlib import Path

CONTENT, ALERT, HANDSHAKE, CHANGE_CIPHER_SPEC = b"\x17", b"\x15", b"\x16", b"\x14"


class RawClient:
    """A client after its handshake. Records must be sent in the order in which they are made."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, log: Path) -> None:
        """``log`` is a file for the secrets of the connection."""
        context.keylog_filename = str(log)
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self._out.read())
                self._in.write(sock.recv(65536))
        sock.sendall(self._out.read())
        cipher = self._tls.cipher()
        assert cipher is not None
        assert cipher[0] == "TLS_AES_256_GCM_SHA384"
        found = re.findall(r"^CLIENT_TRAFFIC_SECRET_0 \w+ (\w+)$", log.read_text(), re.MULTILINE)
        self._use(bytes.fromhex(found[-1]))

    def _use(self, secret: bytes) -> None:
        self._secret, self._sequence = secret, 0
        self._key, self._iv = _expand(secret, b"key", 32), _expand(secret, b"iv", 12)

    def record(self, content: bytes, kind: bytes = CONTENT, padding: int = 0) -> bytes:
        inner = content + kind + bytes(padding)
        header = b"\x17\3\3" + (len(inner) + 16).to_bytes(2, "big")
        nonce = bytes(a ^ b for a, b in zip(self._iv, self._sequence.to_bytes(12, "big"), strict=True))
        self._sequence += 1
        return header + _aes_gcm(self._key, nonce, header, inner)

    def key_update(self, request: int) -> bytes:
        """The records after it have the next key."""
        record = self.record(b"\x18\0\0\1" + bytes([request]), HANDSHAKE)
        self._use(_expand(self._secret, b"traffic upd", 48))
        return record

    def send(self, *records: bytes) -> None:
        self._sock.sendall(b"".join(records))

    def read(self) -> bytes:
        """The content of the next record; empty after close_notify. Raises OSError for an alert and any other end."""
        while True:
            try:
                return self._tls.read(65536)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLWantReadError:
                received = self._sock.recv(65536)
                self._in.write(received) if received else self._in.write_eof()


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label (RFC 8446 §7.1) of at most one block."""
    info = size.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
    return hmac.digest(secret, info + b"\1", "sha384")[:size]


def _aes_gcm(key: bytes, nonce: bytes, header: bytes, plain: bytes) -> bytes:
    """AES-256-GCM, which Python does not have and OpenSSL, in Python's own ssl, has."""
    import _ssl

    openssl = ctypes.CDLL(getattr(_ssl, "__file__", None))
    openssl.EVP_CIPHER_CTX_new.restype = openssl.EVP_aes_256_gcm.restype = ctypes.c_void_p
    context = ctypes.c_void_p(openssl.EVP_CIPHER_CTX_new())
    out, size, tag = ctypes.create_string_buffer(len(plain)), ctypes.c_int(), ctypes.create_string_buffer(16)
    try:
        assert openssl.EVP_EncryptInit_ex(context, ctypes.c_void_p(openssl.EVP_aes_256_gcm()), None, key, nonce) == 1
        assert openssl.EVP_EncryptUpdate(context, None, ctypes.byref(size), header, len(header)) == 1
        assert openssl.EVP_EncryptUpdate(context, out, ctypes.byref(size), plain, len(plain)) == 1
        assert openssl.EVP_EncryptFinal_ex(context, None, ctypes.byref(size)) == 1
        assert openssl.EVP_CIPHER_CTX_ctrl(context, 0x10, 16, tag) == 1  # EVP_CTRL_AEAD_GET_TAG
    finally:
        openssl.EVP_CIPHER_CTX_free(context)
    return out.raw + tag.raw
