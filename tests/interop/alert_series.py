"""The input series of ops/prometheus/rules_test.yml: what programs really count for one dialogue each, so many times a minute.

``python -m tests.interop.alert_series`` records them from the programs and writes them into the file.
"""

from __future__ import annotations

import contextlib
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

from tests.interop.recorded_programs import PORT_NAMES, RecordedPrograms
from tests.support.programs import Programs
from tests.support.prometheus import OPS, RULES

FILE = OPS / "prometheus" / "rules_test.yml"
Phases = Sequence[tuple[int, dict[str, int]]]
"""Minutes, and how often in each of them there is which dialogue. 0 is a state, without anything that is counted."""


@dataclass(frozen=True)
class Recording:
    """What one dialogue adds to counters, and the gauges after it, by series."""

    counted: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)


# For each group of the file, by its name: what happens to which instance.
SCENARIOS: dict[str, dict[str, Phases]] = {
    "one of two backends goes down, then the other": {
        "edge1": [(5, {"both up": 0}), (10, {"one down": 0}), (10, {"both down": 0})],
    },
    "a worker dies in the edge, and later one in the core": {
        "edge1": [(9, {}), (1, {"edge's worker dies": 1}), (40, {})],
        "core1": [(29, {}), (1, {"core's worker dies": 1}), (20, {})],
    },
    "certificates that expire after 15, 10 and 2 days": {"edge1": [(20, {"certificates": 0})]},
    "a certificate that expired a day ago": {"edge1": [(20, {"certificates, three days later": 0})]},
    "a reload that succeeds, then one that fails": {
        "edge1": [(4, {}), (1, {"good reload": 1}), (5, {}), (1, {"failed reload": 1}), (90, {})],
    },
    "the clients of two listeners, of at most 10": {"edge1": [(9, {"8 clients": 0}), (20, {"9 clients": 0})]},
    "clients are rejected for max_clients, others for the rate": {
        "edge1": [(4, {}), (20, {"one client too many": 6})],
        "edge2": [(24, {"too quick a client": 60})],
        "core1": [(4, {}), (20, {"one client too many for the core": 6})],
    },
    "descriptors that are nearly all open": {
        "edge1": [(5, {"few descriptors": 0}), (15, {"many descriptors": 0})],
    },
    "handshakes": {
        "edge1": [(40, {"tls": 60, "distrusting": 30, "stalled": 10, "reset": 10})],
        "edge2": [(40, {"tls": 270, "stalled": 30})],
        "edge3": [(40, {"tls": 1, "stalled": 6})],
        "edge4": [(40, {"tls": 60, "scanner": 90, "reset": 90})],
    },
    "replies": {
        "core1": [(60, {"accepted": 8, "raised at MAIL": 2, "check": 12})],
        "core2": [(60, {"raised at connect": 10, "check": 12})],
        "core3": [(60, {"unknown recipient": 10, "check": 24})],
        "core4": [(60, {"accepted": 90, "raised at MAIL": 5, "unknown recipient": 5, "check": 12})],
        "core5": [(60, {"accepted": 1, "wrong password": 60, "check": 12})],
        "core6": [(60, {"raised in a group": 10, "check": 12})],
    },
    "deliveries": {
        "core1": [(30, {"delivered": 3, "deferred": 1})],
        "core2": [(30, {"delivered": 1, "rejected by the next hop": 9})],
    },
    "logins": {
        "core1": [(20, {"wrong password": 60, "wrong password by LOGIN": 60, "right password": 60})],
        "core2": [(20, {"wrong password": 1, "right password": 600})],
    },
    "one injection, remembered for an hour": {
        "edge1": [(9, {"upgraded": 10}), (1, {"upgraded": 10, "injection": 1}), (90, {"upgraded": 10})],
    },
    "clients that bypass the edge or the load balancer, and health checks that disconnect": {
        "core1": [(20, {"no PROXY header": 1, "accepted": 10})],
        "core2": [(20, {"silent check": 9, "accepted": 10})],
        "edge1": [(20, {"untrusted load balancer": 1})],
    },
}


# Recording


def recorded(programs: Programs) -> dict[str, Recording]:
    """Every dialogue and state, once, by name."""
    recorder = Recorder(programs)
    for name, step in recorder.programs.steps():
        recorder.record(name, step)
    return recorder.found


@dataclass
class Recorder:
    """Takes what a program serves before and after a dialogue."""

    given: Programs
    found: dict[str, Recording] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.programs = RecordedPrograms(self.given)

    def record(self, name: str, step: tuple[Callable[[], dict[str, float]], Callable[[], object], str]) -> None:
        read, dialogue, sign = step
        before = _readable(read())
        dialogue()
        after = self._until_moved(read, before, sign) if sign else _readable(read())
        counted = {each: value - before.get(each, 0) for each, value in after.items() if _is_counter(each)}
        gauges = {each: value for each, value in after.items() if not _is_counter(each)}
        self.found[name] = Recording({each: by for each, by in counted.items() if by}, gauges)

    @staticmethod
    def _until_moved(read: Callable[[], dict[str, float]], before: dict[str, float], sign: str) -> dict[str, float]:
        """The series once one whose name has ``sign`` in it has moved, and the clients are gone, unless it is they who stay."""
        deadline = time.monotonic() + 60
        while True:
            after = _readable(read())
            moved = any(sign in name and value != before.get(name) for name, value in after.items())
            if moved and ("active" in sign or _clients(after) <= _clients(before)):
                return after
            assert time.monotonic() < deadline, f"{sign} did not move"


def _clients(series: dict[str, float]) -> float:
    return sum(value for name, value in series.items() if "_connections_active" in name)


def _is_counter(series: str) -> bool:
    return series.partition("{")[0].endswith("_total")


def _readable(series: dict[str, float]) -> dict[str, float]:
    """The series with the names of addresses in place of ports, which are others each time. Descriptors are tens of them."""

    def named(name: str) -> str:
        return re.sub(r"127\.0\.0\.1:(\d+)", lambda found: PORT_NAMES.get(int(found[1]), found[0]), name)

    return {named(name): value // 10 * 10 if name == "process_open_fds" else value for name, value in series.items()}


# Writing


def families_of(alerts: set[str]) -> set[str]:
    """The metrics that these alerts read, themselves or by what is recorded for them."""
    rules = re.split(r"\n +- (?=record|alert)", RULES)[1:]
    expressions = {re.match(r"\w+: (\S+)", rule)[1]: rule.partition("expr:")[2] for rule in rules}  # type: ignore[index]
    wanted, found = list(alerts), set()
    while wanted:
        names = set(re.findall(r"(?<![\w:$])(?:fumi_\w*[\w:]*|process_\w+|instance:[\w:]+)", expressions[wanted.pop()]))
        wanted += names & set(expressions)
        found |= names - set(expressions)
    return found


def written(text: str, recordings: dict[str, Recording]) -> str:
    """The file, whose text this is, with these recordings. Raises KeyError for a group that is not there."""
    groups = re.split(r"(?=^  - name: )", text, flags=re.MULTILINE)
    left = set(SCENARIOS)
    for number, group in enumerate(groups):
        name = re.match(r"  - name: (.*)", group)
        if name is None or name[1] not in SCENARIOS:
            continue
        left.remove(name[1])
        families = families_of(set(re.findall(r"alertname: (\w+)", group)))
        lines = [line for each in SCENARIOS[name[1]] for line in _instance(name[1], each, families, recordings)]
        begin, end = group.index("    input_series:\n") + len("    input_series:\n"), group.index("    alert_rule_test:\n")
        groups[number] = group[:begin] + "".join(lines) + group[end:]
    assert not left, left
    return "".join(groups)


def _instance(group: str, instance: str, families: set[str], recordings: dict[str, Recording]) -> Iterator[str]:
    phases = SCENARIOS[group][instance]
    # Counters at 0 are there, too, as in the programs: those that move in another instance of the group.
    alike = [each for name, each in SCENARIOS[group].items() if name[:4] == instance[:4]]
    counted = {name for each in alike for used in _used(each, recordings) for name in used.counted}
    gauges = {name for used in _used(phases, recordings) for name in used.gauges}
    for name in sorted(each for each in counted | gauges if each.partition("{")[0] in families):
        family, _, labels = name.partition("{")
        labels = ", ".join(part for part in (f'job="fumi-{instance[:4]}"', f'instance="{instance}"', *_parts(labels)) if part)
        yield f"      - series: '{family}{{{labels}}}'\n"
        yield f"        values: '{notation(list(_values(name, phases, recordings)))}'\n"


def _used(phases: Phases, recordings: dict[str, Recording]) -> list[Recording]:
    return [recordings[name] for _, happening in phases for name in happening]


def _parts(labels: str) -> list[str]:
    return re.findall(r'\w+="[^"]*"', labels)


def _values(series: str, phases: Phases, recordings: dict[str, Recording]) -> Iterator[float]:
    """The samples, one for each minute. A counter begins at 0."""
    if _is_counter(series):
        value = 0.0
        yield value
        for minutes, happening in phases:
            for _ in range(minutes):
                value += sum(times * recordings[name].counted.get(series, 0) for name, times in happening.items())
                yield value
    else:
        for minutes, happening in phases:
            (state,) = happening
            yield from [recordings[state].gauges[series]] * minutes


def notation(values: list[float]) -> str:
    """The values as promtool reads them: ``0+2x3`` is 0 2 4 6, and ``1x3`` is 1 1 1 1."""
    steps = [after - before for before, after in pairwise(values)]
    parts, place = [], 0
    while place < len(values):
        run = next((len(list(same)) for _, same in groupby(steps[place:])), 0)
        step = f"{steps[place]:+g}" if run and steps[place] else ""
        parts.append(f"{values[place]:g}{step}x{run}" if run else f"{values[place]:g}")
        place += run + 1
    return " ".join(parts)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(Programs(Path(directory))) as programs:
        FILE.write_text(written(FILE.read_text(), recorded(programs)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
