"""The contestants' turns at a row.

In each round every contestant starts afresh and warms up; then they take their turns, A B C A B C, and C B A C B A in every other
round. So the figures of one round were all taken within the same few seconds, those of two rounds never in the same process, and
nobody always comes after the same neighbour.
"""

import contextlib
import sys
from collections.abc import Generator, Mapping, Sequence
from statistics import mean

from .contestants import Contestant
from .environment import Site
from .loads import LoadFailed
from .measures import Measure
from .processes import ServerFailed
from .report import Result
from .rows import Row

Turns = Generator[float | None, None, None]


def measured(row: Row, site: Site, rounds: int) -> Result:
    """All rounds of a row, or as many of them as the row wants at most."""
    result = Result(row, {contestant.name: [] for contestant in row.contestants()})
    rounds = min(rounds, row.rounds or rounds)
    for number in range(rounds):
        print(f"{row.name}: round {number + 1} of {rounds}", file=sys.stderr)
        take_turns(result, in_order(row, number), site)
    return result


def in_order(row: Row, number: int) -> tuple[Contestant, ...]:
    """The contestants of a row in the order of their turns in round `number`: every other round from the last to the first."""
    return row.contestants()[:: -1 if number % 2 else 1]


def take_turns(result: Result, order: Sequence[Contestant], site: Site) -> None:
    """One round: everybody's figure, or the reason why there is none. One that has failed before takes part no more."""
    fit = [contestant for contestant in order if contestant.name not in result.errors]
    with contextlib.ExitStack() as servers:
        playing = {it.name: servers.enter_context(contextlib.closing(turns(it, result.row.measure, site))) for it in fit}
        figures = played(playing, result.errors)
    for name, taken in figures.items():
        result.figures[name].append(mean(taken))


def turns(contestant: Contestant, measure: Measure, site: Site) -> Turns:
    """A contestant's way through a round: None when it is warm, then a figure each turn; after the last one the server stops."""
    with contestant.start(site) as server:
        measure.warm_up(server)
        yield None
        for _ in range(measure.turns):
            yield measure(server)


def played(playing: Mapping[str, Turns], errors: dict[str, str]) -> dict[str, list[float]]:
    """Have them take one turn each until all are through. Gives the figures of those that got there; `errors` gets the rest."""
    figures: dict[str, list[float]] = {name: [] for name in playing}
    remaining = dict(playing)
    while remaining:
        for name, taking in list(remaining.items()):
            try:
                if (figure := next(taking)) is not None:
                    figures[name].append(figure)
            except StopIteration:
                del remaining[name]
            except (ServerFailed, LoadFailed) as error:
                errors[name] = "; ".join([str(error), *getattr(error, "__notes__", [])])
                del remaining[name], figures[name]
    return figures
