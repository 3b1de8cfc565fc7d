"""What --cert and --key stand for: files, directories of them, Let's Encrypt's; which are there now, and whether they changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from fumi_edge.pem import CertificateError, Pair, Source, holds_key, is_path

Stamp = tuple[tuple[object, ...], ...]
"""Equal for two looks at files between which nothing happened to them."""


def give_keys(certs: Sequence[Source], keys: Sequence[Source]) -> list[Pair]:
    """Give out the keys in their order: one to each file, or one to each file that holds none; directories need none.

    Raises CertificateError when they do not come out even.
    """
    wanting = [number for number, cert in enumerate(certs) if not _is_directory(cert)] if keys else []
    if len(wanting) != len(keys):
        wanting = [number for number in wanting if not holds_key(certs[number])]
    if len(wanting) != len(keys):
        raise CertificateError(
            f"{len(certs)} --cert but {len(keys)} --key, and {len(wanting)} of those are files without a key: give each of them"
            " its --key, in their order, and none to directories"
        )
    given = dict(zip(wanting, keys, strict=True))
    return [Pair(cert, given.get(number)) for number, cert in enumerate(certs)]


def find(pair: Pair) -> list[Pair]:
    """The certificates that one --cert stands for: itself or, for a directory, what is there now, in the order of the names.

    A directory is Let's Encrypt's (/etc/letsencrypt, its live/, or one live/NAME), or holds *.pem, each with its key inside or
    beside it as NAME.key or NAME.pem.key; what is in them is not looked at. Raises CertificateError when there is none.
    """
    if not _is_directory(pair.cert):
        return [pair]
    directory = os.fspath(pair.cert)
    assert isinstance(directory, str)
    fullchain, privkey = _lineage(directory)
    if os.path.lexists(fullchain) and os.path.lexists(privkey):
        return [Pair(fullchain, privkey)]
    live = os.path.join(directory, "live")
    directory = live if os.path.isdir(live) else directory
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError as error:
        raise CertificateError(f"{directory}: cannot read the directory: {error.strerror}") from None
    found = [each for name in names if (each := _entry(os.path.join(directory, name)))]
    if not found:
        raise CertificateError(f"{directory}: holds neither *.pem nor NAME/fullchain.pem with NAME/privkey.pem")
    return found


def _entry(path: str) -> Pair | None:
    fullchain, privkey = _lineage(path)
    if os.path.lexists(fullchain):
        return Pair(fullchain, privkey)
    if not path.endswith(".pem"):
        return None
    beside = (path.removesuffix(".pem") + ".key", path + ".key")
    return Pair(path, next((key for key in beside if os.path.lexists(key)), None))


def _lineage(directory: str) -> tuple[str, str]:
    """Where certbot puts a certificate with its chain, and the key."""
    return os.path.join(directory, "fullchain.pem"), os.path.join(directory, "privkey.pem")


def _is_directory(source: Source) -> bool:
    return is_path(source) and os.path.isdir(source)


def stamp(pairs: Iterable[Pair], *others: Source | None) -> Stamp:
    """How all files of these sources are now, by stat() through symbolic links: certbot renews by putting a new link in place."""
    files: list[Source | None] = []
    for pair in pairs:
        try:
            files += [each for found in find(pair) for each in found]
        except CertificateError:
            files.append(pair.cert)
    return tuple(_stat(each) for each in (*files, *others) if each is not None and is_path(each))


def _stat(path: Source) -> tuple[object, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        return path, error.errno
    # The time of change too: a file that could not be read may have become readable.
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
