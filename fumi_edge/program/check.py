"""--check: certificates, listeners that cannot be bound, files that --user cannot read, and backends.

An address in use is not a problem: usually a running edge uses it, and this is the check before its restart.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import click

from fumi_core.runtime.listening import check_listen
from fumi_core.runtime.privileges import find
from fumi_core.runtime.settings import CONFIGURATION_OK, SettingError
from fumi_edge.backends.health import dependency_problems, offering_starttls
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Certificates

_ACL = "system.posix_acl_access"


def check(settings: EdgeSettings, certificates: Certificates, user: str | None, probing: bool) -> None:
    """Print the result of ``--check``; ``probing``: check the backends too. Raises SettingError with all problems in one line."""
    now = time.time()
    problems = [*certificates.validity_problems(now), *certificates.authority_problems(now)]
    if problem := certificates.startup_problem():
        problems.append(problem)
    listen_check = check_listen(settings.listen_addresses)
    problems += listen_check.problems
    if user:
        problems += [f"--user {user} cannot read {path}" for path in unreadable(user, certificates.files())]
    if probing:
        results = zip(settings.backends.destinations, dependency_problems(settings.backends), strict=True)
        problems += [f"backend {each.name}: {problem}" for each, problem in results if problem]
    for warning in _warnings(settings, probing):
        click.echo(f"warning: {warning}")
    for address in listen_check.in_use:
        click.echo(f"{address} is already in use (by a running fumi-edge or another program)")
    if problems:
        raise SettingError("; ".join(problems))
    click.echo(CONFIGURATION_OK)


def _warnings(settings: EdgeSettings, probing: bool) -> Iterator[str]:
    """Yield warnings about settings that work but may have unexpected effects."""
    backends = settings.backends
    if backends.proxy_protocol != "off":
        for place in settings.listen_addresses:
            if place.address.kind == "unix" and place.flag != "--metrics":
                yield f"{place}: Postfix, Exim and Dovecot reject the PROXY headers of its clients, which have no IP address"
    elif probing:
        for backend, offers in zip(backends.destinations, offering_starttls(backends), strict=True):
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
