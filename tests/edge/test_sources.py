"""What --cert and --key stand for: files, directories of PEM files, and certbot's tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fumi_edge.tls.pem import CertificateError, Pair
from fumi_edge.tls.sources import find, give_keys, stamp
from tests.support.certificates import MakeCertificate
from tests.support.waiting import until


@dataclass
class LetsEncrypt:
    """/etc/letsencrypt as certbot leaves it."""

    path: Path

    def renew(self, name: str, number: int, cert: str = "", key: str = "") -> None:
        """Write files into archive/ and swap the links in live/."""
        live, archive = self.path / "live" / name, self.path / "archive" / name
        for directory in (live, archive):
            directory.mkdir(parents=True, exist_ok=True)
        (live / "README").write_text("This directory contains your keys and certificates.\n")
        for each, text in (("cert", cert), ("chain", ""), ("fullchain", cert), ("privkey", key)):
            (archive / f"{each}{number}.pem").write_text(text)
            (live / "new").symlink_to(f"../../archive/{name}/{each}{number}.pem")
            (live / "new").rename(live / f"{each}.pem")


@pytest.fixture
def letsencrypt(tmp_path: Path) -> LetsEncrypt:
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "README").write_text("[cert name]/privkey.pem: the private key for your certificate.\n")
    return LetsEncrypt(tmp_path)


def paths(pairs: Iterable[Pair]) -> list[tuple[str | None, ...]]:
    return [tuple(None if each is None else str(each) for each in pair) for pair in pairs]


def test_certbots_tree_may_be_named_at_each_of_its_levels(letsencrypt: LetsEncrypt) -> None:
    top, renew = letsencrypt.path, letsencrypt.renew
    renew("b.test", 1)
    renew("a.test", 1)
    a, b = (
        (f"{top}/live/{name}/fullchain.pem", f"{top}/live/{name}/privkey.pem") for name in ("a.test", "b.test")
    )  # cert.pem, which lacks the chain, and chain.pem are left alone
    assert paths(find(Pair(top))) == [a, b]
    assert paths(find(Pair(f"{top}/live"))) == [a, b]
    assert paths(find(Pair(f"{top}/live/b.test/"))) == [b]


def test_a_directory_gives_every_pem_file_with_the_key_beside_it(tmp_path: Path) -> None:
    for name in ("b.pem", "a.pem", "a.key", "c.pem", "c.pem.key", ".hidden.pem", "README", "d.pem~", "e.crt"):
        (tmp_path / name).write_text("")
    directory = str(tmp_path)
    assert paths(find(Pair(directory))) == [
        (f"{directory}/a.pem", f"{directory}/a.key"),
        (f"{directory}/b.pem", None),
        (f"{directory}/c.pem", f"{directory}/c.pem.key"),
    ]


def test_a_directory_may_be_a_kubernetes_secret_or_hold_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        data = tmp_path / name / "..2026_01_31"
        data.mkdir(parents=True)
        (tmp_path / name / "..data").symlink_to(data.name)
        for file in ("ca.crt", "tls.crt", "tls.key"):
            (data / file).write_text("")
            (tmp_path / name / file).symlink_to(f"..data/{file}")
    a, b = ((f"{tmp_path}/{name}/tls.crt", f"{tmp_path}/{name}/tls.key") for name in ("a", "b"))
    assert paths(find(Pair(tmp_path / "a"))) == [a]
    assert paths(find(Pair(tmp_path))) == [a, b]
    before = stamp([Pair(tmp_path)])
    new = tmp_path / "a" / "..2026_02_01"
    (tmp_path / "a" / "..2026_01_31").rename(new)
    (new / "tls.crt").write_text("renewed")
    (tmp_path / "a" / "..new").symlink_to(new.name)
    (tmp_path / "a" / "..new").rename(tmp_path / "a" / "..data")
    assert stamp([Pair(tmp_path)]) != before


def test_a_directory_without_certificates_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("")
    with pytest.raises(CertificateError, match=r"neither \*\.pem, nor fullchain\.pem with privkey\.pem, tls\.crt with tls\.key"):
        find(Pair(tmp_path))


def test_keys_go_to_the_files_in_their_order(make_certificate: MakeCertificate, tmp_path: Path) -> None:
    (a, a_key), (b, b_key) = make_certificate("a.test"), make_certificate("b.test")
    both = tmp_path / "both.pem"
    both.write_text(b.read_text() + b_key.read_text())
    assert give_keys([a, b], [a_key, b_key]) == [(a, a_key), (b, b_key)]
    assert give_keys([tmp_path, a], [a_key]) == [(tmp_path, None), (a, a_key)]  # a directory needs none
    assert give_keys([both, a], [a_key]) == [(both, None), (a, a_key)]  # nor does who has one
    assert give_keys([both, a], [b_key, a_key]) == [(both, b_key), (a, a_key)]
    assert give_keys([both, tmp_path], []) == [(both, None), (tmp_path, None)]
    for certs, keys in (([a, b], [a_key]), ([tmp_path], [a_key]), ([both], [a_key, b_key]), ([both, both], [b_key])):
        with pytest.raises(CertificateError, match=f"^{len(certs)} --cert but {len(keys)} --key"):
            give_keys(certs, keys)


def await_tick(path: Path) -> None:
    """Wait until files get another time stamp: two changes within one tick of that clock would look like one."""
    path.touch()
    before = path.stat().st_mtime_ns

    def ticked() -> bool:
        path.touch()
        return path.stat().st_mtime_ns != before

    until(ticked, "the clock's tick")


def test_a_stamp_changes_with_the_files_and_not_otherwise(
    letsencrypt: LetsEncrypt, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("clock") / "tick"
    top, renew = letsencrypt.path, letsencrypt.renew
    renew("a.test", 1)
    plain = tmp_path / "plain.pem"
    plain.write_text("x")
    sources, ca = [Pair(top), Pair(plain), Pair(b"text", "-----BEGIN")], tmp_path / "ca.pem"
    seen = [stamp(sources, ca)]
    assert stamp(sources, ca) == seen[0]

    def changed() -> bool:
        seen.append(stamp(sources, ca))
        await_tick(elsewhere)
        return seen[-1] not in seen[:-1]

    renew("a.test", 2)  # the same text under another link
    assert changed()
    renew("b.test", 1)
    assert changed()
    plain.write_text("y")
    assert changed()
    plain.chmod(0o600)  # what could not be read may be readable now
    assert changed()
    plain.unlink()
    assert changed()
    ca.write_text("")
    assert changed()
    (top / "live").rename(top / "gone")
    assert changed()
