"""Finds the files that --cert and --key stand for (files, or directories such as Let's Encrypt's or Kubernetes') and notices
when they change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from fumi_core.runtime.files import in_time
from fumi_edge.tls.pem import CertificateError, Pair, Source, holds_key, is_path, label

_LAYOUTS = (("fullchain.pem", "privkey.pem"), ("tls.crt", "tls.key"))
"""File names of certificate and key: certbot's, and those of a Kubernetes Secret of type kubernetes.io/tls."""
Stamp = tuple[tuple[object, ...], ...]
"""The state of files: two stamps are equal if the files have not changed between them."""


def give_keys(certs: Sequence[Source], keys: Sequence[Source]) -> list[Pair]:
    """Assign the keys in their order: one to each file, or one to each file without a key. Directories get none.

    Raises CertificateError when the numbers do not match.
    """
    wanting = [number for number, cert in enumerate(certs) if not _is_directory(cert)] if keys else []
    if len(wanting) != len(keys):
        wanting = [number for number in wanting if not holds_key(certs[number])]
    if len(wanting) != len(keys):
        raise CertificateError(
            f"{len(certs)} --cert but {len(keys)} --key: each --cert that is a file without a key, here {len(wanting)}, needs its"
            " --key, in their order; directories need none"
        )
    given = dict(zip(wanting, keys, strict=True))
    return [Pair(cert, given.get(number)) for number, cert in enumerate(certs)]


def find(pair: Pair) -> list[Pair]:
    """The certificate files of one --cert: the file itself, or the files in a directory now, in the order of their names.

    A directory is Let's Encrypt's (/etc/letsencrypt, its live/, or one live/NAME), a Kubernetes Secret's (tls.crt and tls.key),
    or holds such directories or *.pem files, each with its key inside or beside it as NAME.key or NAME.pem.key. The files are
    not read. Raises CertificateError when a directory holds no certificate file.
    """
    if not is_path(pair.cert):
        return [pair]
    path = os.fspath(pair.cert)
    assert isinstance(path, str)
    try:
        return in_time(path, lambda: _find(pair, path))
    except TimeoutError as error:
        raise CertificateError(f"{path}: cannot read it: {error.strerror}") from None


def _find(pair: Pair, directory: str) -> list[Pair]:
    if not os.path.isdir(directory):
        return [pair]
    for cert, key in _by_layout(directory):
        if os.path.lexists(cert) and os.path.lexists(key):
            return [Pair(cert, key)]
    live = os.path.join(directory, "live")
    directory = live if os.path.isdir(live) else directory
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError as error:
        raise CertificateError(f"{directory}: cannot read the directory: {error.strerror}") from None
    found = [each for name in names if (each := _entry(os.path.join(directory, name)))]
    if not found:
        layouts = ", ".join(" with ".join(layout) for layout in _LAYOUTS)
        raise CertificateError(f"{directory}: holds no certificate: neither *.pem, nor {layouts}, nor directories with these")
    return found


def _entry(path: str) -> Pair | None:
    for cert, key in _by_layout(path):
        if os.path.lexists(cert):
            return Pair(cert, key)
    if not path.endswith(".pem"):
        return None
    beside = (path.removesuffix(".pem") + ".key", path + ".key")
    return Pair(path, next((key for key in beside if os.path.lexists(key)), None))


def _by_layout(directory: str) -> list[tuple[str, str]]:
    """The paths of certificate chain and key in each known layout."""
    return [(os.path.join(directory, cert), os.path.join(directory, key)) for cert, key in _LAYOUTS]


def _is_directory(source: Source) -> bool:
    try:
        return is_path(source) and in_time(label(source), lambda: os.path.isdir(source))
    except TimeoutError:
        return False  # reading it will report the error


def stamp(pairs: Iterable[Pair], *others: Source | None) -> Stamp:
    """The state of all files of these sources. stat() follows symbolic links, because certbot renews by replacing a link."""
    pairs = list(pairs)
    try:
        return in_time("", lambda: _stamp(pairs, others, _stat))
    except TimeoutError:
        # A file system hangs: check each file separately, so that the others are still checked.
        return _stamp(pairs, others, _stat_in_time)


def _stamp(pairs: Iterable[Pair], others: Iterable[Source | None], look: Callable[[Source], tuple[object, ...]]) -> Stamp:
    files: list[Source | None] = []
    for pair in pairs:
        try:
            files += [each for found in find(pair) for each in found]
        except CertificateError:
            files.append(pair.cert)
    return tuple(look(each) for each in (*files, *others) if each is not None and is_path(each))


def _stat_in_time(path: Source) -> tuple[object, ...]:
    try:
        return in_time(os.path.dirname(label(path)), lambda: _stat(path))
    except TimeoutError as error:
        return path, error.errno


def _stat(path: Source) -> tuple[object, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        return path, error.errno
    # With st_ctime, because a change of permissions may have made the file readable.
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
