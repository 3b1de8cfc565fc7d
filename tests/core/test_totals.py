"""The sums over all workers: what is added up, what is not, and what outlives a worker."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from fumi_core.runtime.counting import Counter, Gauge, Level, Limit
from fumi_core.runtime.scoreboard import Scoreboard, WorkerState
from fumi_core.runtime.totals import Reporter, Totals, register_restarts


class Worker:
    """A worker's metrics, which it reports to its slot."""

    def __init__(self, board: Scoreboard, number: int) -> None:
        self.slot = board.slots[number]
        self.registry = CollectorRegistry()
        self.mails = Counter("x_mails", "Mails.", (), self.registry).labels()
        self.open = Gauge("x_open", "Open.", (), self.registry, over_workers="sum").labels()
        self.up = Gauge("x_up", "Up.", ("backend",), self.registry, over_workers="max")
        self.connections = {"a": 0}
        Level(
            "x_used", "Used.", ("backend",), self.registry, lambda: [((each,), count) for each, count in self.connections.items()]
        )
        self.limits = (100.0, 150.0)
        Limit("x_limit", "May be.", self.registry, lambda: self.limits)
        self.slot.state = WorkerState.SERVING
        self._reporter = Reporter(self.registry, self.slot)

    def report(self, problem: str | None = None) -> None:
        self._reporter.write(problem)


def totals_of(board: Scoreboard) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Totals(Worker(Scoreboard(1), 0).registry, board))
    register_restarts(registry, "x", board)
    return registry


def test_gauges_of_things_are_added_up_and_of_a_state_the_largest_is_shown() -> None:
    board = Scoreboard(2)
    for number, worker in enumerate([Worker(board, 0), Worker(board, 1)]):
        worker.open.set(2 + number)
        worker.up.labels("a").set(number)
        worker.up.labels("b").set(1)
        worker.report()
    totals = totals_of(board)
    assert totals.get_sample_value("x_open") == 5
    assert [totals.get_sample_value("x_up", {"backend": name}) for name in "ab"] == [1, 1]


def test_a_level_is_added_up_and_a_limit_is_at_most_that_of_all_workers() -> None:
    board = Scoreboard(2)
    for number, worker in enumerate([Worker(board, 0), Worker(board, 1)]):
        worker.connections["a"] = 2 + number
        worker.report()
    totals = totals_of(board)
    assert totals.get_sample_value("x_used", {"backend": "a"}) == 5
    assert totals.get_sample_value("x_limit") == 150
    board.slots[1].clear()
    assert totals.get_sample_value("x_used", {"backend": "a"}) == 2
    assert totals.get_sample_value("x_limit") == 100


def test_the_counts_of_a_worker_outlive_it_and_its_gauges_do_not() -> None:
    board = Scoreboard(2)
    for number in (0, 1):
        worker = Worker(board, number)
        worker.mails.inc(10)
        worker.open.inc()
        worker.report()
    board.slots[1].clear()
    board.restarts += 1
    totals = totals_of(board)
    names = ("x_mails_total", "x_open", "x_worker_restarts_total")
    assert [totals.get_sample_value(name) for name in names] == [20, 1, 1]
    successor = Worker(board, 1)
    successor.mails.inc()
    successor.report()
    assert [totals.get_sample_value(name) for name in names] == [21, 1, 1]


def test_a_series_that_was_removed_is_no_longer_shown() -> None:
    worker = Worker(Scoreboard(1), 0)
    worker.up.labels("a").set(1)
    worker.up.labels("b").set(1)
    worker.up.remove("a")
    assert [worker.registry.get_sample_value("x_up", {"backend": name}) for name in "ab"] == [None, 1]


def test_the_program_can_serve_while_one_worker_can() -> None:
    board = Scoreboard(2)
    workers = [Worker(board, 0), Worker(board, 1)]
    totals = Totals(workers[0].registry, board)
    for problems, problem in ((("no", None), None), (("no", "none"), "no"), ((None, None), None)):
        for worker, each in zip(workers, problems, strict=True):
            worker.report(each)
        assert totals.local_problem() == problem
