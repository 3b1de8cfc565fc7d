"""The values of single metrics, by the names that tests use for them."""

from __future__ import annotations

from tests.edge.backends import Backend, Flapping
from tests.edge.program import Program
from tests.support.waiting import until


def active(program: Program, listener: str) -> float:
    return program.metric("fumi_edge_connections_active", listener=listener)


def gone(program: Program, listener: str) -> None:
    until(lambda: active(program, listener) == 0, "the end of the last connection")


def rejected(program: Program, reason: str) -> float:
    return program.metric("fumi_edge_rejected_total", reason=reason)


def await_rejections(program: Program, reason: str, count: int) -> None:
    until(lambda: rejected(program, reason) == count, f"{count} rejections")


def await_backend(program: Program, server: Backend | Flapping, state: int) -> None:
    """Wait until the backend is up (1) or down (0)."""
    until(lambda: up(program, server) == state, "the backend's rise" if state else "the backend's fall")


def up(program: Program, server: Backend | Flapping) -> float:
    return program.metric("fumi_edge_backend_up", backend=server.address)


def errors(program: Program, server: Backend | Flapping, reason: str) -> float:
    return program.metric("fumi_edge_backend_errors_total", backend=server.address, reason=reason)


def reloads(program: Program, result: str) -> float:
    return program.metric("fumi_edge_certificate_reloads_total", result=result)


def starttls_total(program: Program, result: str, count: int = 1) -> None:
    until(lambda: program.metric("fumi_edge_starttls_total", result=result) == count, f"starttls_total {result}")
