"""The command line of the benchmarks: `ops/bench [--json FILE] [--rounds N] [--soak N] [ROW …]`."""

import argparse
import resource
from collections.abc import Sequence
from pathlib import Path

from . import environment, report
from .rounds import measured
from .rows import DESCRIPTORS, ROWS, SOAK_MESSAGES, SOAK_SLICE, Row, soak


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    names = ", ".join(row.name for row in ROWS)
    parser = argparse.ArgumentParser(
        prog="ops/bench",
        description="CPU and memory of Fumi as ratios to its peers', measured by turns in one run. Needs Linux.",
        epilog="The exit status is 1 when a row is invalid, some contestant having failed; a missed target leaves it at 0.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each contestant does each row (default 5)")
    soaking = f"messages of the row soak, at least {2 * SOAK_SLICE} (default {SOAK_MESSAGES})"
    parser.add_argument("--soak", type=int, default=SOAK_MESSAGES, metavar="N", help=soaking)
    which = f"rows by name or by the start of it (default all but soak): {names}"
    parser.add_argument("rows", nargs="*", metavar="ROW", help=which)
    asked = parser.parse_args()
    if asked.soak < 2 * SOAK_SLICE:
        parser.error(f"--soak is at least {2 * SOAK_SLICE}: growth is from the first {SOAK_SLICE} messages on")
    return asked


def chosen(starts: Sequence[str]) -> list[Row]:
    """The rows whose names start with one of these, for none all but those on request. SystemExit for a start that no row has."""
    for start in starts:
        if not any(row.name.startswith(start) for row in ROWS):
            raise SystemExit(f"ops/bench: no row is called {start}")
    if not starts:
        return [row for row in ROWS if not row.on_request]
    return [row for row in ROWS if row.name.startswith(tuple(starts))]


def allow_descriptors() -> None:
    """Let this process and all that it starts open DESCRIPTORS files, or as many as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main() -> None:
    """Install what is missing, measure, report."""
    asked = parsed_arguments()
    rows = [soak(asked.soak) if row.name == "soak" else row for row in chosen(asked.rows)]
    allow_descriptors()
    try:
        environment.install()
    except environment.PeerMissing as error:
        raise SystemExit(f"ops/bench: {error}") from error
    with environment.site() as site:
        results = [measured(row, site, asked.rounds) for row in rows]
    print(environment.interpreter())
    print(report.table(results))
    if asked.json:
        report.write_json(asked.json, results, asked.rounds, environment.versions())
    if any(result.errors for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
