"""Ticket keys: renewed daily and with the client CA, by all workers together, and never used again."""

from __future__ import annotations

import copy
import ssl

import pytest

import fumi_edge.tls.ticket_keys
from fumi_edge.tls.ticket_keys import KEY_LIFETIME_SECONDS, TicketKeys

Workers = tuple[list[TicketKeys], float]


@pytest.fixture
def workers() -> Workers:
    """The keys of three workers, as they are after a fork."""
    keys = TicketKeys(lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    now = keys._began
    keys.context("CA", now)
    keys.share()
    return [copy.copy(keys) for _ in range(3)], now


def test_all_workers_renew_their_keys_together_once_in_a_lifetime(workers: Workers) -> None:
    all_keys, now = workers
    used: list[ssl.SSLContext] = []
    for day in range(5):
        for moment in (0.0, KEY_LIFETIME_SECONDS * 0.99):
            contexts = {keys.context("CA", now + day * KEY_LIFETIME_SECONDS + moment) for keys in all_keys}
            assert len(contexts) == 1
        used += contexts
    assert len(set(used)) == 5


def test_other_authorities_have_other_keys_in_all_workers(workers: Workers) -> None:
    all_keys, now = workers
    first = all_keys[0].context("CA", now)
    second = all_keys[0].context("another", now)
    # The others learn of it a little later, and keep what they have until then.
    assert all_keys[1].context("CA", now) == first != second
    assert [keys.context("another", now) for keys in all_keys] == [second] * 3
    third = all_keys[2].context("CA", now)
    assert third not in (first, second)


def test_a_worker_that_comes_later_with_an_old_client_ca_does_not_part_the_others(workers: Workers) -> None:
    (first, second, late), now = workers
    assert first.context("new", now) == second.context("new", now)
    late.context("CA", now)
    assert late.context("new", now) == first.context("new", now) == second.context("new", now)


def test_when_the_prepared_keys_are_used_up_each_worker_has_its_own(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    all_keys, now = workers
    after = now + KEY_LIFETIME_SECONDS * (fumi_edge.tls.ticket_keys.PREPARED_CONTEXTS + 1)
    for day in range(fumi_edge.tls.ticket_keys.PREPARED_CONTEXTS + 1):
        contexts = {keys.context("CA", now + day * KEY_LIFETIME_SECONDS) for keys in all_keys}
        assert len(contexts) == 1
    assert len({keys.context("CA", after) for keys in all_keys}) == 3
