"""What a worker of the edge reports for the status page: its state of the backends, and its certificates.

A worker reports every second, so this is from memory, and the certificates are looked through only when they have changed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fumi_core.runtime.overview import Facts
from fumi_edge.backends.choice import Backend
from fumi_edge.edge import Edge
from fumi_edge.settings import EdgeSettings
from fumi_edge.tls.certificates import Selection
from fumi_edge.tls.pem import Certificate
from fumi_edge.tls.policy import CertificateSettings

MAX_CERTIFICATES = 100
"""Certificates that are reported: those that expire first."""
MAX_NAMES = 20
"""Names of a certificate that are reported."""


class EdgeFacts:
    """The facts of an edge. ``read()`` may be called in any thread."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._looked_at: tuple[EdgeSettings, dict[CertificateSettings, Selection]] | None = None
        self._certificates: list[dict[str, Any]] = []

    def read(self) -> Facts:
        looked_at = self._edge.settings, {own: each.selection for own, each in self._edge.certificates.items()}
        if looked_at != self._looked_at:
            self._certificates, self._looked_at = _all_certificates(*looked_at), looked_at
        return {
            "backends": {name: _backend(each) for name, each in self._edge.backends.items()},
            "certificates": self._certificates[:MAX_CERTIFICATES],
            "more_certificates": max(0, len(self._certificates) - MAX_CERTIFICATES),
        }


def _all_certificates(settings: EdgeSettings, selections: Mapping[CertificateSettings, Selection]) -> list[dict[str, Any]]:
    """All certificates, those that expire first at the beginning."""
    found = []
    for own, selection in selections.items():
        listeners = settings.listeners_with(own) if len(selections) > 1 else None
        found += [_certificate(each, each in selection.served, listeners) for each in selection.certificates]
    # A certificate that no client gets is not urgent.
    return sorted(found, key=lambda each: (not each["served"], each["not_after"]))


def _backend(backend: Backend) -> dict[str, Any]:
    return {
        "up": backend.up,
        "changed_at": backend.changed_at,
        "last_check": backend.last_check,
        "last_error": backend.last_error,
    }


def _certificate(certificate: Certificate, served: bool, listeners: str | None) -> dict[str, Any]:
    return {
        "name": certificate.name,
        "names": certificate.names[:MAX_NAMES],
        "more_names": max(0, len(certificate.names) - MAX_NAMES),
        "issuer": certificate.issuer,
        "file": str(certificate.pair),
        "key_type": certificate.kind,
        "loaded": certificate.loaded,
        "not_before": certificate.not_before,
        "not_after": certificate.not_after,
        "served": served,
        "listeners": listeners,
    }


def days_left(certificate: Facts, now: float | None = None) -> int:
    """Whole days until a certificate of the facts expires; below 0 when it has expired."""
    return int((certificate["not_after"] - (time.time() if now is None else now)) // 86400)
