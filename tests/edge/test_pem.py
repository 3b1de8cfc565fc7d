"""Reading certificate files: PEM in all its shapes, what is wrong with other files, and what the error says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import CertificateError, Pair, authorities, load
from fumi_edge.tls.policy import Policy
from tests.support.certificates import Authority, MakeCertificate


@pytest.mark.parametrize("key_first", [False, True])
def test_the_key_may_be_in_the_certificates_file(make_certificate: MakeCertificate, tmp_path: Path, key_first: bool) -> None:
    texts = [path.read_text() for path in make_certificate("localhost")]
    both = tmp_path / "both.pem"
    both.write_text("".join(reversed(texts) if key_first else texts))
    assert load(Pair(both)).names == ("localhost",)


def test_certificate_and_key_may_be_given_as_text(make_certificate: MakeCertificate) -> None:
    cert, key = make_certificate("localhost")
    assert load(Pair(cert.read_text(), key.read_bytes())).names == ("localhost",)
    with pytest.raises(CertificateError, match=r"^\(PEM text\): holds no private key"):
        load(Pair(cert.read_text()))


@pytest.mark.parametrize(
    "case",
    ["missing", "directory", "no certificate", "no key", "other key", "encrypted", "no key file", "nonsense", "weak", "half"],
)
def test_an_unusable_certificate_is_an_error_of_one_line_that_names_the_file(
    make_certificate: MakeCertificate, tmp_path: Path, case: str
) -> None:
    cert, key = make_certificate("localhost")
    other = make_certificate("other.test")[1]
    encrypted, nonsense, weak, half = (tmp_path / f"{name}.pem" for name in ("encrypted", "nonsense", "weak", "half"))
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", encrypted], check=True)
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n")
    half.write_text(cert.read_text()[:300])
    if case == "weak":
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-nodes",
                "-newkey",
                "rsa:1024",
                "-subj",
                "/CN=weak",
                "-keyout",
                weak,
                "-out",
                tmp_path / "x",
            ],
            check=True,
            capture_output=True,
        )
        weak.write_text(weak.read_text() + (tmp_path / "x").read_text())
    arguments, complaint = {
        "missing": ((tmp_path / "none.pem", key), "cannot read the certificate: No such file"),
        "directory": ((tmp_path, key), "cannot read the certificate: Is a directory"),
        "no certificate": ((key, key), "holds no PEM certificate"),
        "no key": ((cert, None), "holds no private key; name its file with --key"),
        "other key": ((cert, other), "does not belong to the certificate"),
        "encrypted": ((cert, encrypted), "is encrypted"),
        "no key file": ((cert, tmp_path / "none.pem"), "cannot read the key: No such file"),
        "nonsense": ((nonsense, key), "OpenSSL cannot read the certificate"),
        "weak": ((weak, None), "not usable by a TLS server: ee key too small"),
        "half": ((half, key), "holds no PEM certificate"),
    }[case]
    with pytest.raises(CertificateError, match=complaint) as caught:
        load(Pair(*arguments))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("/")


def test_the_error_for_another_pem_form_says_how_to_convert_it(make_certificate: MakeCertificate, tmp_path: Path) -> None:
    cert, key = make_certificate("localhost")
    made = {name: tmp_path / name for name in ("cert.der", "key.der", "both.p12", "new.pem")}

    def openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    openssl("x509", "-in", cert, "-outform", "DER", "-out", made["cert.der"])
    openssl("pkey", "-in", key, "-outform", "DER", "-out", made["key.der"])
    openssl("pkcs12", "-export", "-in", cert, "-inkey", key, "-passout", "pass:", "-out", made["both.p12"])
    new = made["new.pem"]
    for pair, converted in (
        (Pair(made["cert.der"], key), Pair(new, key)),
        (Pair(cert, made["key.der"]), Pair(cert, new)),
        (Pair(made["both.p12"]), Pair(new)),
    ):
        with pytest.raises(
            CertificateError, match=r"(der|p12): is (DER|PKCS#12) and not PEM; convert it with openssl "
        ) as caught:
            load(pair)
        old, _, command = str(caught.value).partition(": is ")
        words = command.partition("with openssl ")[2].split()
        password = ["-passin", "pass:"] if "pkcs12" in words else []
        files: dict[str, str | Path] = {"OLD": old, "NEW": new}
        openssl(*(files.get(word, word) for word in words), *password)
        assert load(converted).names == ("localhost",)
    with pytest.raises(CertificateError, match=r"cert\.der: is DER and not PEM"):
        authorities(made["cert.der"])


def test_a_chain_that_begins_with_the_ca_is_an_error(
    authority: Authority, make_certificate: MakeCertificate, tmp_path: Path
) -> None:
    cert, key = authority.issue("localhost")
    chain = tmp_path / "chain.pem"
    complaint = r"certificate in .*chain\.pem, whose first certificate is an authority's: the server's own must come first$"
    chain.write_text(authority.path.read_text() + cert.read_text())
    with pytest.raises(CertificateError, match=complaint):
        load(Pair(chain, key))
    alone, other = make_certificate("alone.test")[0], make_certificate("other.test")[1]  # which may sign, as it is its own
    with pytest.raises(CertificateError, match=r"does not belong to the certificate in .*cert\.pem$"):
        load(Pair(alone, other))


@pytest.mark.parametrize("second", ["AAAA", "é", "bm9uc2Vuc2U=", None])
def test_a_certificate_of_several_that_cannot_be_read_is_named_by_its_number(
    authority: Authority, tmp_path: Path, second: str | None
) -> None:
    cert, key = authority.issue("localhost")
    chain = tmp_path / "chain.pem"
    ended = "" if second is None else f"{second}\n-----END CERTIFICATE-----\n"
    chain.write_text(f"{cert.read_text()}-----BEGIN CERTIFICATE-----\n{ended}{authority.path.read_text()}")
    with pytest.raises(CertificateError) as caught:
        load(Pair(chain, key))
    assert str(caught.value) == f"{chain}: OpenSSL cannot read certificate 2 of the 3 in the file"


STRANGE = """
import itertools
from fumi_edge.tls.pem import CertificateError, Pair, authorities, is_authority, load

begin, end, room = b"-----BEGIN CERTIFICATE-----\\n", b"-----END CERTIFICATE-----\\n", 4 << 20
many = begin * (room // len(begin) - 9)
for data in (many, many + end, begin + end + many, bytes(room), b"-" * room, b"-----BEGIN " * (room // 11), b"\\x30" * room):
    for act in (lambda: load(Pair(data)), lambda: authorities(data), lambda: is_authority(data)):
        try:
            act()
        except CertificateError as error:
            print(len(str(error)) < 200)
"""


def test_a_strange_file_takes_no_longer_than_its_length(tmp_path: Path) -> None:
    """In a process of its own, to be ended: to look at every beginning for every end would take hours."""
    done = subprocess.run([sys.executable, "-c", STRANGE], capture_output=True, text=True, timeout=120, check=True)
    assert set(done.stdout.split()) == {"True"}


def test_a_file_that_is_too_large_is_not_read(make_certificate: MakeCertificate, tmp_path: Path) -> None:
    large = tmp_path / "large.pem"
    large.touch()
    os.truncate(large, 1 << 40)
    cert, key = make_certificate("localhost")
    for pair in (Pair(large), Pair(cert, large)):
        with pytest.raises(CertificateError, match=r"large\.pem: cannot read the (certificate|key): it is larger than 4 MiB"):
            load(pair)
    both = tmp_path / "certs" / "both.pem"
    both.parent.mkdir()
    both.write_text(cert.read_text() + key.read_text())
    certificates = Certificates([(both.parent, None)], Policy(client_ca=cert))
    large.rename(both.parent / "large.pem")
    assert certificates.read().complaints == [f"{both.parent}/large.pem: cannot read the certificate: it is larger than 4 MiB"]


def test_blocks_on_one_line_are_named_as_that(authority: Authority, make_certificate: MakeCertificate, tmp_path: Path) -> None:
    """As cat joins files of which one has no line break at its end; OpenSSL would blame the key."""
    cert, key = authority.issue("localhost")
    stripped = cert.read_text().rstrip("\n")
    number = stripped.count("\n") + 1
    complaint = rf"glued\.pem: line {number} has -----BEGIN after -----END; put a line break between them$"
    glued = tmp_path / "glued.pem"
    for text, pair in (
        (stripped + authority.path.read_text(), Pair(glued, key)),
        (stripped + key.read_text(), Pair(glued)),
        (stripped + key.read_text(), Pair(cert, glued)),
    ):
        glued.write_text(text)
        with pytest.raises(CertificateError, match=complaint):
            load(pair)
    with pytest.raises(CertificateError, match=complaint):
        authorities(glued)


def test_a_byte_order_mark_is_no_part_of_a_file(make_certificate: MakeCertificate, tmp_path: Path) -> None:
    pair = []
    for path in make_certificate("localhost"):
        pair.append(tmp_path / path.name)
        pair[-1].write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(Pair(*pair)).names == ("localhost",)
    assert "\ufeff" not in authorities(pair[0])


def test_loading_leaves_no_descriptor_open(make_certificate: MakeCertificate) -> None:
    cert, key = make_certificate("localhost")
    load(Pair(cert, key))
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        load(Pair(cert, key))
    # Fewer, when a thread of an earlier test or the garbage collector has closed one of theirs.
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_a_key_without_permission_is_reported_as_such(make_certificate: MakeCertificate, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = make_certificate("localhost")
    real = os.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> int:
        if path == key:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CertificateError, match=r"key\.pem: cannot read the key: Permission denied"):
        load(Pair(cert, key))
