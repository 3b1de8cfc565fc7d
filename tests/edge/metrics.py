"""The values of single metrics, by the names that tests use for them."""

from __future__ import annotations

from tests.support.waiting import until


def active(program, listener):
    return program.metric("fumi_edge_connections_active", listener=listener)


def gone(program, listener):
    until(lambda: active(program, listener) == 0, "the end of the last connection")


def rejected(program, reason):
    return program.metric("fumi_edge_rejected_total", reason=reason)


def up(program, server):
    return program.metric("fumi_edge_backend_up", backend=server.address)


def errors(program, server, reason):
    return program.metric("fumi_edge_backend_errors_total", backend=server.address, reason=reason)


def reloads(program, result):
    return program.metric("fumi_edge_certificate_reloads_total", result=result)


def starttls_total(program, result, count=1):
    until(lambda: program.metric("fumi_edge_starttls_total", result=result) == count, f"starttls_total {result}")
