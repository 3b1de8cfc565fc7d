"""Token buckets: a burst of any size is exact, and memory is bounded without a way to have an empty bucket forgotten."""

from __future__ import annotations

from fumi_core.runtime.token_buckets import TokenBuckets
from tests.support.clock import Clock


def test_memory_is_bounded_for_any_number_of_addresses(clock: Clock) -> None:
    buckets = TokenBuckets[str](60, 2, clock, limit=64)
    for number in range(1000):
        assert buckets.take(str(number))
        assert len(buckets) <= 64


def test_an_empty_bucket_outlives_a_flood_of_addresses(clock: Clock) -> None:
    buckets = TokenBuckets[str](60, 3, clock, limit=64)
    assert [buckets.take("limited") for _ in range(4)] == [True, True, True, False]
    for number in range(10_000):
        buckets.take(str(number))
    assert not buckets.take("limited")


def test_full_buckets_are_the_first_to_be_forgotten(clock: Clock) -> None:
    buckets = TokenBuckets[str](1, 100, clock, limit=64)
    for number in range(63):
        buckets.take(str(number))
    clock.now += 2
    buckets.take("new")
    buckets.take("newer")
    assert len(buckets) == 2


def test_a_burst_of_any_rate_is_taken_to_the_last(clock: Clock) -> None:
    for per_minute in (0.1, 1 / 3, 7, 13, 1000):
        buckets = TokenBuckets[str](60 / per_minute, 50, clock)
        assert [buckets.take("a") for _ in range(51)] == [True] * 50 + [False]
