"""The benchmarks of Fumi against its peers, run by `ops/bench`.

What is measured is the CPU (user and system) that a server takes for a unit of work, never the clock: the machine may be busy
with other things, and what counts is the ratio to a peer that did the same work in the same round. Who does what:

    rows.py         the table: each piece of work, who does it, and the ratio to reach
    rounds.py       the contestants' turns at a row
    contestants.py  how each server is started
    measures.py     from a running server to one figure
    loads.py        the work, as the parent sees it: run a generator, insist that it succeeded
    all_in_one.py   the app of the rows of that name; busy_handler.py and noop_hooks.py are those of two others
    client.py       our own load generator, a program of its own; `smtp-source` of Postfix is the other
    backend.py      what stands behind a TLS terminator, a program of its own
    processes.py    starting, stopping, CPU clocks and memory of processes
    environment.py  installing the peers into `.bench/`
    report.py       medians, ratios, the table, JSON
"""
