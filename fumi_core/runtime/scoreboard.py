"""The state of a program's processes, in shared memory that all of them read. The name and the idea are Apache's.

Each worker has a slot: its state, its open connections, its last sign of life, and its last report. A slot outlives its worker:
the last report of a killed worker is still there for its replacement and for the sums. The master has a report, too.

Each field is eight aligned bytes that only one process writes, so no reader sees a half-written value. A report is written to the
half of the buffer that is not current; then the count of reports is raised, which makes it current. A reader that finds the count
raised meanwhile reads again. A worker that is killed while it writes loses only that report.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import MutableSequence
from enum import IntEnum
from typing import TypeAlias

MAX_REPORT_BYTES = 4 << 20
"""Largest report, in bytes. The kernel allocates only the memory that is written."""
MAX_LEAD = 2
"""How many connections a worker may be ahead of the least loaded one before it lets the others accept first."""
DRAINING = "draining"
"""The local problem of a program that is stopping and waits for its connections to end."""
_FIELDS = 5
"""Numbers in a worker's slot."""

Numbers: TypeAlias = "MutableSequence[int] | memoryview[int]"


class WorkerState(IntEnum):
    """A worker's state."""

    ABSENT = 0
    SERVING = 1
    DRAINING = 2


class ConnectionCount:
    """How many connections this worker has, how many the other workers have, and how many clients all of them have.

    A connection counts as a client once admitted. Before its PROXY header, or after a rejection, it is only a connection.
    """

    __slots__ = ("_clients", "_connections", "_number", "_states")

    def __init__(self, number: int, states: Numbers, connections: Numbers, clients: Numbers) -> None:
        self._number = number
        self._states = states
        self._connections = connections
        self._clients = clients

    def opened(self) -> None:
        self._connections[self._number] += 1

    def closed(self) -> None:
        self._connections[self._number] -= 1

    def client_admitted(self) -> None:
        self._clients[self._number] += 1

    def client_left(self) -> None:
        self._clients[self._number] -= 1

    @property
    def clients(self) -> int:
        """Clients in all workers; exact except for changes that are being made at this moment."""
        return sum(self._clients)

    @property
    def connections(self) -> int:
        """Connections of this worker."""
        return self._connections[self._number]

    @property
    def ahead(self) -> bool:
        """Whether this worker has over MAX_LEAD connections more than some other worker that serves."""
        enough = self._connections[self._number] - MAX_LEAD
        if enough <= 0:
            return False
        workers = zip(self._states, self._connections, strict=True)
        return any(count < enough and state == WorkerState.SERVING for state, count in workers)


def count_of_one_process() -> ConnectionCount:
    """The count of a server without other workers."""
    return ConnectionCount(0, [WorkerState.SERVING], [0], [0])


class Reports:
    """The reports of one process, of which the last can be read by all. ``number`` is its place on the board."""

    def __init__(self, board: Scoreboard, number: int) -> None:
        self._board = board
        self._number = number

    def write(self, report: bytes) -> None:
        """Store a report. Raises ValueError for a report of more than MAX_REPORT_BYTES bytes."""
        if len(report) > MAX_REPORT_BYTES:
            raise ValueError(f"a report of {len(report)} bytes; the maximum is {MAX_REPORT_BYTES}")
        number = self._board.reports[self._number] + 1
        place = self._place(number)
        self._board.memory[place * MAX_REPORT_BYTES : place * MAX_REPORT_BYTES + len(report)] = report
        self._board.lengths[place] = len(report)
        self._board.reports[self._number] = number

    def read(self) -> bytes:
        """The last report; empty before the first."""
        while True:
            number = self._board.reports[self._number]
            place = self._place(number)
            report = bytes(self._board.memory[place * MAX_REPORT_BYTES : place * MAX_REPORT_BYTES + self._board.lengths[place]])
            if self._board.reports[self._number] == number:
                return report

    def _place(self, number: int) -> int:
        return self._number * 2 + number % 2


class Slot(Reports):
    """One worker's place on the board. The worker writes; the others read."""

    def __init__(self, board: Scoreboard, number: int) -> None:
        super().__init__(board, number)
        self.number = number
        self.connection_count = ConnectionCount(number, board.states, board.connections, board.clients)

    @property
    def state(self) -> WorkerState:
        return WorkerState(self._board.states[self._number])

    @state.setter
    def state(self, state: WorkerState) -> None:
        self._board.states[self._number] = state

    @property
    def reloads(self) -> int:
        """The number of the last reload that this worker has completed."""
        return self._board.reloads_seen[self._number]

    @reloads.setter
    def reloads(self, number: int) -> None:
        self._board.reloads_seen[self._number] = number

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._board.signs[self._number] / 1e9

    def live(self) -> None:
        """Give a sign of life."""
        self._board.signs[self._number] = time.monotonic_ns()

    def clear(self) -> None:
        """The worker has ended: remove its connections; keep its report."""
        self.state = WorkerState.ABSENT
        self._board.connections[self._number] = self._board.clients[self._number] = 0


class Scoreboard:
    """The slots of all workers, and the reports of their master; created before any worker is forked."""

    def __init__(self, workers: int) -> None:
        reporting = workers + 1
        size = 8 * (_FIELDS * workers + 3 * reporting + 2)
        memory = memoryview(mmap.mmap(-1, size + reporting * 2 * MAX_REPORT_BYTES))
        numbers, self.memory = memory[:size].cast("q"), memory[size:]
        fields = [numbers[at * workers : (at + 1) * workers] for at in range(_FIELDS)]
        self.states, self.signs, self.reloads_seen, self.connections, self.clients = fields
        others = numbers[_FIELDS * workers :]
        self.reports, self.lengths, self._own = others[:reporting], others[reporting : 3 * reporting], others[3 * reporting :]
        self.slots = [Slot(self, number) for number in range(workers)]
        self.master = Reports(self, workers)

    @property
    def restarts(self) -> int:
        """Workers that died and were replaced."""
        return self._own[0]

    @restarts.setter
    def restarts(self, number: int) -> None:
        self._own[0] = number

    @property
    def reloads(self) -> int:
        """How often new settings were found valid."""
        return self._own[1]

    @reloads.setter
    def reloads(self, number: int) -> None:
        self._own[1] = number

    def local_problem(self) -> str | None:
        """Why no worker accepts connections, or None."""
        if WorkerState.SERVING in self.states:
            return None
        return DRAINING if WorkerState.DRAINING in self.states else "not accepting"
