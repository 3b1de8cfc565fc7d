"""Ticket keys: renewed daily and with the client CA, by all workers together, and never used again."""

from __future__ import annotations

import copy
import itertools

import pytest

import fumi_edge.tls.ticket_keys
from fumi_edge.tls.ticket_keys import KEY_LIFETIME_SECONDS, TicketKeys


@pytest.fixture
def workers():
    """The keys of three workers, as they are after a fork; contexts are numbers here."""
    keys = TicketKeys(itertools.count(1).__next__)
    now = keys._began
    keys.context("CA", now)
    keys.share()
    return [copy.copy(keys) for _ in range(3)], now


def test_all_workers_renew_their_keys_together_once_in_a_lifetime(workers):
    workers, now = workers
    used = []
    for day in range(5):
        for moment in (0.0, KEY_LIFETIME_SECONDS * 0.99):
            contexts = {keys.context("CA", now + day * KEY_LIFETIME_SECONDS + moment) for keys in workers}
            assert len(contexts) == 1
        used += contexts
    assert len(set(used)) == 5


def test_other_authorities_have_other_keys_in_all_workers(workers):
    workers, now = workers
    first = workers[0].context("CA", now)
    second = workers[0].context("another", now)
    # The others learn of it a little later, and keep what they have until then.
    assert workers[1].context("CA", now) == first != second
    assert [keys.context("another", now) for keys in workers] == [second] * 3
    third = workers[2].context("CA", now)
    assert third not in (first, second)


def test_a_worker_that_comes_later_with_an_old_client_ca_does_not_part_the_others(workers):
    (first, second, late), now = workers
    assert first.context("new", now) == second.context("new", now)
    late.context("CA", now)
    assert late.context("new", now) == first.context("new", now) == second.context("new", now)


def test_when_the_prepared_keys_are_used_up_each_worker_has_its_own(workers, monkeypatch):
    workers, now = workers
    after = now + KEY_LIFETIME_SECONDS * (fumi_edge.tls.ticket_keys.PREPARED_CONTEXTS + 1)
    for day in range(fumi_edge.tls.ticket_keys.PREPARED_CONTEXTS + 1):
        contexts = {keys.context("CA", now + day * KEY_LIFETIME_SECONDS) for keys in workers}
        assert len(contexts) == 1
    assert len({keys.context("CA", after) for keys in workers}) == 3
