"""All certificates of an edge: which one a client gets for the name it requests (SNI, RFC 6066 §3), and their renewal.

Every handshake begins in one context, the front, which has no certificate and stays when certificates change. Session ticket keys
belong to the context that a handshake began in, so sessions survive a renewal of certificates, and workers forked from one
process share them (``ticket_keys``). When the name is known the handshake goes on in a context of the current Selection. A
selection never changes: a renewal makes a complete new one, which replaces the old one in one step.

A name with an RSA and an ECDSA certificate has both in one context, and OpenSSL picks the one that the client can verify. Among
several certificates for one name and kind of key, the valid one that expires last is served. This choice depends on the time,
so a selection is made for one point in time and has an end.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import socket
import ssl
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fumi_core.runtime.logs import event
from fumi_edge.tls.pem import (
    Certificate,
    CertificateError,
    NoServer,
    Pair,
    Source,
    authorities_in,
    is_authority,
    is_path,
    label,
    load,
)
from fumi_edge.tls.policy import IGNORE_UNEXPECTED_EOF, Policy, TLSSocket
from fumi_edge.tls.sources import Stamp, find, stamp
from fumi_edge.tls.ticket_keys import TicketKeys

log = logging.getLogger("fumi.edge")


class Selection:
    """The contexts by name, chosen at ``now`` (seconds since 1970) from the certificates in their order.

    Clients that request an unknown name or none get the context for the first certificate's name. ``served`` are the
    certificates in use. The choice holds from ``chosen_at`` to ``until``: then a certificate expires or becomes valid.
    """

    def __init__(
        self,
        certificates: Sequence[Certificate],
        policy: Policy,
        client_ca: str | None,
        now: float,
        before: Selection | None = None,
    ) -> None:
        """``before`` is a selection of the same policy, whose contexts are reused for unchanged certificates."""
        self.certificates = tuple(certificates)
        self.client_ca = client_ca
        self.chosen_at = now
        self.until = min((moment for each in certificates for moment in each.changes(now)), default=math.inf)
        self._policy = policy
        self._contexts: dict[tuple[Certificate, ...], ssl.SSLContext] = {}
        self._old = before._contexts if before is not None and before.client_ca == client_ca else {}
        by_name: dict[str, list[Certificate]] = {}
        for certificate in certificates:
            for name in certificate.names:
                by_name.setdefault(name, []).append(certificate)
        chosen = {name: _best(candidates, now) for name, candidates in by_name.items()}
        self._by_name = {name: self._context(_wildcard(name, kinds, chosen, now) or kinds) for name, kinds in chosen.items()}
        first = certificates[0]
        self._default = self._by_name[first.names[0]] if first.names else self._context((first,))
        self._old = {}
        self.served = frozenset(itertools.chain(*self._contexts))

    def _context(self, kinds: tuple[Certificate, ...]) -> ssl.SSLContext:
        """The one context with these certificates: new, or the previous selection's."""
        if kinds not in self._contexts:
            if (context := self._old.get(kinds)) is None:
                context = self._policy.context(self.client_ca)
                for certificate in kinds:
                    certificate.give(context)
            self._contexts[kinds] = context
        return self._contexts[kinds]

    def context_for(self, name: str | None) -> ssl.SSLContext:
        """The context for a server name: the exact one, then the wildcard for its first label, then the first certificate's.

        A valid wildcard certificate is preferred to an exact one that is not valid.
        """
        if not name:
            return self._default
        name = name.lower().rstrip(".")
        return self._by_name.get(name) or self._by_name.get(_parent(name)) or self._default


def _parent(name: str) -> str:
    """The wildcard that covers a name (RFC 6125 §6.4.3)."""
    return "*." + name.partition(".")[2]


def _best(candidates: Iterable[Certificate], now: float) -> tuple[Certificate, ...]:
    """Choose for each kind of key the valid certificate that expires last; the earlier in order if two expire together.

    A kind without a valid certificate is left out, unless no kind has a valid one.
    """
    kinds: dict[str, Certificate] = {}
    for each in sorted(candidates, key=lambda each: (each.validity_problem(now) is None, each.not_after), reverse=True):
        kinds.setdefault(each.kind, each)
    valid = tuple(each for each in kinds.values() if each.validity_problem(now) is None)
    return valid or tuple(kinds.values())


def _wildcard(
    name: str, kinds: Sequence[Certificate], chosen: Mapping[str, tuple[Certificate, ...]], now: float
) -> tuple[Certificate, ...] | None:
    """The wildcard certificates that replace those of an exact name because only the wildcard is valid; or None."""
    wildcard = chosen.get(_parent(name), ())
    is_valid = [each.validity_problem(now) is None for each in wildcard]
    return tuple(wildcard) if any(is_valid) and all(each.validity_problem(now) for each in kinds) else None


class Reading(NamedTuple):
    """The result of reading all sources: the certificates of each (``groups``), and a line for each error (``complaints``).

    ``stamp`` is the state of the files before they were read. ``skipped`` has a line for each file of a directory that is not
    a server certificate, such as a CA certificate.
    """

    sources: Sequence[Pair]
    groups: list[list[Certificate]]
    selection: Selection
    stamp: Stamp
    complaints: list[str]
    skipped: list[str]


class Certificates:
    """The certificates in use."""

    def __init__(self, sources: Sequence[tuple[Source, Source | None]], policy: Policy | None = None) -> None:
        """Load the (certificate, key) pairs; a certificate may be a directory (see ``sources.find``). Raises CertificateError."""
        if not sources:
            raise CertificateError("no certificate: name one with --cert")
        self.policy = policy or Policy()
        self._current: Reading = None  # type: ignore[assignment]
        self._current = self._read_strictly([Pair(*source) for source in sources])
        self._ticket_keys = TicketKeys(self._make_front)
        self.renew_ticket_keys(time.time())

    @property
    def sources(self) -> Sequence[Pair]:
        return self._current.sources

    @property
    def selection(self) -> Selection:
        return self._current.selection

    @property
    def entries(self) -> tuple[Certificate, ...]:
        return self.selection.certificates

    @property
    def stamp_read(self) -> Stamp:
        """The ``stamp()`` from before the certificates in use were read: if it differs now, a file has changed."""
        return self._current.stamp

    def stamp(self) -> Stamp:
        """The state of all files, equal as long as no file changes."""
        return stamp(self._current.sources, self.policy.client_ca)

    def files(self) -> list[str]:
        """The paths of the files and directories that are read at a renewal."""
        pairs = [*self._current.sources, *(entry.pair for entry in self.entries), Pair(self.policy.client_ca or b"")]
        return list(dict.fromkeys(label(each) for pair in pairs for each in pair if each is not None and is_path(each)))

    def read(self) -> Reading:
        """Read all files again without changing anything yet; this may be called in another thread.

        A source with an error keeps its previous certificates: one whose files cannot be used any more, a directory that is
        missing or empty, a valid certificate whose new version is not valid. The default certificate, which is the first, stays
        even when its file was removed from a directory, unless another file there has a certificate for its name.
        """
        sources, old, selection, *_ = self._current
        before = self.stamp()
        complaints: list[str] = []
        skipped: list[str] = []
        groups = [self._renew(source, group, complaints, skipped) for source, group in zip(sources, old, strict=True)]
        default = old[0][0]
        is_replaced = any(set(default.names[:1]) & set(each.names) for each in groups[0])
        if default.pair not in [each.pair for each in groups[0]] and not is_replaced:
            complaints.append(
                f"{default.pair}: the file was removed; it was the default certificate and stays in use until the next start"
            )
            groups[0].insert(0, default)
        client_ca = selection.client_ca
        try:
            client_ca = self.policy.read_client_ca()
        except CertificateError as error:
            complaints.append(str(error))
        return Reading(sources, groups, self._select(groups, client_ca), before, complaints, skipped)

    def install(self, reading: Reading) -> None:
        """Use a reading for handshakes that begin from now on; ignored when ``update`` was called after it was read."""
        if reading.sources is self._current.sources:
            self._put(reading)

    def renew(self) -> list[str]:
        """Read all files again, and use what is good. Returns a line for each error."""
        self.install(reading := self.read())
        return reading.complaints

    def choose(self, now: float) -> Reading:
        """The certificates in use with a selection for ``now`` (seconds since 1970), to install after ``selection.until``.

        It reads no files and changes nothing, and may be called in another thread.
        """
        current = self._current
        return current._replace(
            selection=Selection(self.entries, self.policy, current.selection.client_ca, now, current.selection)
        )

    def update(self, cert: Source, key: Source | None = None) -> None:
        """Replace all certificates by this one. Raises CertificateError without changing anything."""
        self._put(self._read_strictly([Pair(cert, key)]))

    def _read_strictly(self, sources: Sequence[Pair]) -> Reading:
        complaints: list[str] = []
        skipped: list[str] = []
        before = stamp(sources, self.policy.client_ca)
        groups = [self._renew(source, [], complaints, skipped) for source in sources]
        if complaints:
            raise CertificateError(complaints[0])
        return Reading(sources, groups, self._select(groups, self.policy.read_client_ca()), before, [], skipped)

    def _renew(self, source: Pair, old: Sequence[Certificate], complaints: list[str], skipped: list[str]) -> list[Certificate]:
        """Read one source, keeping the previous certificate for each one that has an error.

        A directory may hold CA certificates beside server certificates. A CA certificate is an error only if no file can be used.
        """
        try:
            pairs = find(source)
        except CertificateError as error:
            complaints.append(str(error))
            return list(old)
        before = {certificate.pair: certificate for certificate in old}
        found: list[Certificate] = []
        beside: list[str] = []
        for pair in pairs:
            previous = before.get(pair)
            try:
                found.append(self._load(pair, previous))
            except CertificateError as error:
                no_server = isinstance(error, NoServer) and previous is None and is_authority(pair.cert)
                (beside if no_server else complaints).append(str(error))
                found += [previous] if previous else []
        (skipped if found else complaints).extend(beside)
        return found or list(old)

    def _load(self, pair: Pair, previous: Certificate | None) -> Certificate:
        certificate = load(pair, previous)
        if certificate is not previous:
            certificate.give(self.policy.context())
            now = time.time()
            if previous is not None and not previous.validity_problem(now) and (problem := certificate.validity_problem(now)):
                raise CertificateError(f"{problem}; the old certificate is valid and stays in use")
        return certificate

    def _select(self, groups: Sequence[Sequence[Certificate]], client_ca: str | None) -> Selection:
        before = None if self._current is None else self._current.selection
        return Selection(list(itertools.chain(*groups)), self.policy, client_ca, time.time(), before)

    def _put(self, reading: Reading) -> None:
        self._current = reading
        # A session whose client certificate was verified by an old CA must not be resumed.
        self.renew_ticket_keys(time.time())

    def share_ticket_keys(self) -> None:
        """Let the processes that are forked from now on resume each other's sessions. Raises OSError."""
        self._ticket_keys.share()

    def close(self) -> None:
        """Release the contexts of later ticket keys. Connections that have begun can still make their handshakes."""
        self._ticket_keys.close()

    def renew_ticket_keys(self, now: float) -> None:
        """Use the ticket keys of the time ``now``, in seconds since 1970; call it at least every few minutes."""
        self._front = self._ticket_keys.context(self.selection.client_ca, now)

    def _make_front(self) -> ssl.SSLContext:
        # Without client CA certificates: the context that is chosen by the server name verifies client certificates.
        context = self.policy.context()
        context.sni_callback = self._on_server_name
        _expect_any_server_name()
        return context

    def _on_server_name(self, sock: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        sock.server_name = name  # type: ignore[attr-defined]
        sock.context = self._current.selection.context_for(name)

    def wrap(self, sock: socket.socket) -> TLSSocket:
        """Wrap a connected non-blocking socket, and take it over. Raises OSError when the connection has ended."""
        # When OpenSSL accepts a missing close_notify as an end, a ragged EOF in Python can only be a reset.
        wrapped = self._front.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=not IGNORE_UNEXPECTED_EOF
        )
        assert isinstance(wrapped, TLSSocket)
        return wrapped

    def ciphers(self) -> list[tuple[str, str]]:
        """(TLS version, cipher) for all ciphers that can be negotiated."""
        found = [(str(each["protocol"]), str(each["name"])) for each in self._front.get_ciphers()]
        return [(version, name) for version, name in found if version in ("TLSv1.2", "TLSv1.3")]

    @property
    def skipped(self) -> Sequence[str]:
        """A line for each file of a directory that was skipped."""
        return self._current.skipped

    def startup_problem(self) -> str | None:
        """Why TLS 1.2, although the policy allows it, fails with every certificate in use; or None."""
        kinds = sorted({entry.kind for entry in self.entries})
        auth = {str(each["auth"]) for each in self._front.get_ciphers() if each["protocol"] == "TLSv1.2"}
        if self.policy.min_tls != "1.2" or auth & {"auth-any", *(f"auth-{kind.lower()}" for kind in kinds)}:
            return None
        names = " or ".join(kinds)
        return f"--ciphers {self.policy.ciphers}: no cipher works with a certificate for {names}, so no client can use TLS 1.2"

    @property
    def served(self) -> list[Certificate]:
        """The certificates that clients can get; the others are for names that have a better certificate."""
        return [entry for entry in self.entries if entry in self.selection.served]

    def validity_problems(self, now: float) -> list[str]:
        """A line for each certificate that is served and not valid at ``now`` (seconds since 1970)."""
        return [problem for entry in self.served if (problem := entry.validity_problem(now))]

    def authority_problems(self, now: float) -> list[str]:
        """A line for each CA certificate, in a served chain or of clients, that is not valid at ``now`` (seconds since 1970)."""
        sent = [problem for entry in self.served for problem in entry.chain_problems(now)]
        place, trusted = label(self.policy.client_ca or b""), authorities_in(self.selection.client_ca or "")
        return sent + [f"{place}: {problem}" for each in trusted if (problem := each.validity_problem(now))]

    def local_problem(self, now: float) -> str | None:
        """Why no served certificate is valid at ``now`` (seconds since 1970), or None when one is."""
        problems = self.validity_problems(now)
        return f"no valid certificate: {problems[0]}" if len(problems) == len(self.served) else None


@functools.cache
def _expect_any_server_name() -> None:
    """Log one line for a server name that is not ASCII, for which Python's ssl prints a traceback."""
    others = sys.unraisablehook

    def hook(problem: sys.UnraisableHookArgs) -> None:
        # Before Python 3.14 the object is the name; since then the message mentions it.
        named = isinstance(problem.object, bytes) or "servername" in (problem.err_msg or "")
        if named and isinstance(problem.exc_value, UnicodeDecodeError):
            event(log, logging.INFO, "server name is not ASCII")
        else:
            others(problem)

    sys.unraisablehook = hook
