"""--check: certificates, listeners that cannot be bound, files that --user cannot read, and backends.

An address in use is not a problem: usually a running edge uses it, and this is the check before its restart.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import click

from fumi_core.runtime.listening import ListenAddress, check_listen
from fumi_core.runtime.privileges import find
from fumi_core.runtime.settings import CONFIGURATION_OK, SettingError
from fumi_edge.backends.health import dependency_problems, offering_starttls
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.certificate_reload import Renewed
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.policy import CertificateSettings

_ACL = "system.posix_acl_access"


def check(
    settings: EdgeSettings, certificates: Mapping[CertificateSettings, Certificates], user: str | None, probing: bool
) -> None:
    """Print the result of ``--check``; ``probing``: check the backends too. Raises SettingError with all problems in one line."""
    credentials = [each.tls.credentials for pool in settings.all_backends for each in pool.destinations if each.tls]
    lines = [line for each in certificates.values() for line in _certificate_problems(each)]
    lines += [line for each in credentials for line in each.validity_problems(time.time())]
    problems = list(dict.fromkeys(lines))
    listen_check = check_listen(settings.listen_addresses)
    problems += listen_check.problems
    if user:
        renewed: list[Renewed] = [*certificates.values(), *credentials]
        files = dict.fromkeys(path for each in renewed for path in each.files())
        problems += [f"--user {user} cannot read {path}" for path in unreadable(user, files)]
    if probing:
        for pool in _each_backend_once(settings):
            results = zip(pool.destinations, dependency_problems(pool), strict=True)
            problems += [f"backend {each.name}: {problem}" for each, problem in results if problem]
    for warning in _warnings(settings, probing):
        click.echo(f"warning: {warning}")
    for address in listen_check.in_use:
        click.echo(f"{address} is already in use (by a running fumi-edge or another program)")
    if problems:
        raise SettingError("; ".join(problems))
    click.echo(CONFIGURATION_OK)


def _certificate_problems(certificates: Certificates) -> Iterator[str]:
    now = time.time()
    yield from certificates.validity_problems(now)
    yield from certificates.authority_problems(now)
    if problem := certificates.startup_problem():
        yield problem


def _each_backend_once(settings: EdgeSettings) -> Iterator[BackendSettings]:
    """Yield the settings of all backends; a backend of several listeners is yielded for the first only."""
    seen: set[str] = set()
    for pool in settings.all_backends:
        new = tuple(each for each in pool.destinations if each.name not in seen)
        seen.update(each.name for each in new)
        if new:
            yield replace(pool, destinations=new)


def _warnings(settings: EdgeSettings, probing: bool) -> Iterator[str]:
    """Yield warnings about settings that work but may have unexpected effects."""
    for each in settings.listeners:
        backends = each.backends or settings.backends
        if each.address.kind == "unix" and backends.proxy_protocol != "off":
            place = ListenAddress(each.setting, each.address)
            yield f"{place}: Postfix, Exim and Dovecot reject the PROXY headers of its clients, which have no IP address"
    for pool in _each_backend_once(settings) if probing else ():
        if pool.proxy_protocol == "off":
            for backend, offers in zip(pool.destinations, offering_starttls(pool), strict=True):
                if offers:
                    yield f"backend {backend.name} offers STARTTLS, which RFC 3207 forbids inside TLS: disable it there"


def unreadable(name: str, paths: Iterable[str]) -> list[str]:
    """The files and directories that a user cannot read according to owners and modes. Raises PrivilegeError."""
    user = find(name)
    if user.pw_uid == 0:
        return []
    groups = os.getgrouplist(name, user.pw_gid)
    return [path for path in paths if not _readable(path, user.pw_uid, groups)]


def _readable(path: str, uid: int, groups: Sequence[int]) -> bool:
    return _allowed(path, 4, uid, groups) and all(_allowed(each, 1, uid, groups) for each in _way(path))


def _way(path: str) -> set[str]:
    """All parent directories of a path and, if it is a link, of its target."""
    way: set[str] = set()
    for each in (os.path.abspath(path), os.path.realpath(path)):
        while each != (each := os.path.dirname(each)):
            way.add(each)
    return way


def _allowed(path: str, right: int, uid: int, groups: Sequence[int]) -> bool:
    """Whether the mode grants a right (4 to read, 1 to enter a directory). True when this is unknown, as with an ACL."""
    try:
        found = os.stat(path)
        with contextlib.suppress(OSError):
            if _ACL in os.listxattr(path):
                return True
    except OSError:
        return True
    shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
    return bool(found.st_mode >> shift & right)
