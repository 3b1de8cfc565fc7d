"""``maildir:/srv/mail/%d/%n/Maildir``: a Maildir for each recipient, below a directory that exists for each.

``%u`` is the address, ``%n`` its local part and ``%d`` its domain, in lower case and without the detail that follows the
recipient delimiter. A recipient exists when the directory up to the last variable does. What is below it is created when it is
needed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fumi_core.delivery.maildir_files import DirectorySync, MaildirDirectory
from fumi_core.delivery.maildir_owner import Owner
from fumi_core.smtp.domains import canonical
from fumi_core.smtp.grammar import CONTROL_CHARACTER, Address
from fumi_core.smtp.mailboxes import check_delimiter, mailbox_of

_VARIABLE = re.compile("%(.?)", re.DOTALL)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def has_variables(path: str) -> bool:
    """Whether the path has a variable. A path without one may contain any percent signs."""
    return re.search("%[und]", path) is not None


class MaildirTemplate:
    """A path with variables. ``root`` is the part that is the same for all recipients."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for an unknown variable."""
        for unknown in (each for each in _VARIABLE.findall(text) if each not in ("u", "n", "d", "%")):
            raise ValueError(f"%{unknown} is not a variable: write %u, %n or %d, or %% for a percent sign")
        self._parts = Path(text).parts
        variable = [number for number, part in enumerate(self._parts) if has_variables(part.replace("%%", ""))]
        if not variable:
            raise ValueError(f"{text!r} has no variable: write each percent sign once")
        self.root = Path(*(_filled(part, {}) for part in self._parts[: variable[0]]))
        self._below = variable[-1] + 1

    def paths(self, values: dict[str, str]) -> tuple[Path, Path] | None:
        """The directory up to the last variable, and the Maildir; None if a value cannot be in a path."""
        if not all(map(_is_plain, values.values())):
            return None
        parts = [_filled(part, values) for part in self._parts]
        try:
            os.fsencode("".join(parts))
        except UnicodeEncodeError:
            return None
        return Path(*parts[: self._below]), Path(*parts)


def _filled(part: str, values: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: values.get(match[1], match[1]), part)


def _is_plain(value: str) -> bool:
    """Whether a client's string is a file name, and neither leads to another directory nor names a hidden file."""
    return bool(value) and not value.startswith(".") and "/" not in value and not CONTROL_CHARACTER.search(value)


class RecipientMaildir(MaildirDirectory):
    """The Maildir of one recipient, for one message. ``base`` exists, and owns what is below it."""

    def __init__(self, base: Path, path: Path, sync: DirectorySync) -> None:
        super().__init__(path, sync)
        self._base = base
        self._owner: Owner | None = None

    def acting(self) -> contextlib.AbstractContextManager[object]:
        if self._owner is None:
            self._owner = Owner.of(self._base)
        return self._owner.acting()

    def open_temporary(self, path: Path) -> int:
        assert self._owner is not None
        self._create(self._owner)
        self.remove_stale()
        fd = super().open_temporary(path)
        try:
            self._owner.give(fd)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        return fd

    def _create(self, owner: Owner) -> None:
        """Create what is missing below the base. Each new name is on disk before a message is."""
        between = [each for each in (self.path, *self.path.parents) if self._base in each.parents]
        for directory in (*reversed(between), *(self.path / name for name in ("tmp", "new", "cur"))):
            if not directory.exists():
                owner.make_directory(directory)
                self.sync(directory.parent)


class RecipientMaildirs:
    """Finds the recipients' Maildirs. Everything here that touches the disk may block."""

    def __init__(self, template: str, delimiter: str) -> None:
        """Raises ValueError for an invalid template or delimiter."""
        self._template = MaildirTemplate(template)
        self._delimiter = check_delimiter(delimiter)
        self._sync = DirectorySync()

    @property
    def root(self) -> Path:
        return self._template.root

    def problem(self) -> str | None:
        """Why no recipient can be found, or None."""
        if not self.root.is_dir():
            return f"the directory {self.root} does not exist"
        if not os.access(self.root, os.X_OK):
            return f"cannot enter {self.root}"
        return None

    def exists(self, recipient: str, host: str) -> bool:
        """Whether the recipient has a directory. Raises OSError when that is unknown, as when the root is not mounted."""
        paths = self._paths(recipient, host)
        if paths is None:
            return False
        try:
            return stat.S_ISDIR(os.stat(paths[0]).st_mode)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        os.stat(self.root)
        return False

    def of(self, recipients: Sequence[Address], host: str) -> list[tuple[RecipientMaildir, list[Address]]] | None:
        """The Maildirs of these recipients, each once, with its recipients; None when one cannot have a Maildir."""
        found: dict[Path, tuple[RecipientMaildir, list[Address]]] = {}
        for each in recipients:
            paths = self._paths(each.address, host)
            if paths is None:
                return None
            found.setdefault(paths[1], (RecipientMaildir(*paths, self._sync), []))[1].append(each)
        return list(found.values())

    def _paths(self, recipient: str, host: str) -> tuple[Path, Path] | None:
        user, domain = mailbox_of(recipient, self._delimiter)
        # An address without a domain, such as <postmaster>, is an address of this host.
        name, domain = unicodedata.normalize("NFC", user).lower(), canonical(domain or host)
        return self._template.paths({"u": f"{name}@{domain}", "n": name, "d": domain, "%": "%"})
