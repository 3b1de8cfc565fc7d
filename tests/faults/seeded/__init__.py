"""A campaign of injected faults against fumi-core. Each fault is made from a seed and its number; the claims are always the same.

A message answered 250 is there, each octet of it. A second copy exists only where the client got no 250. Nothing half-written is
visible. The log has no traceback. The server answers again. No descriptor and no connection is left behind.

``pytest -m long tests/faults/seeded`` injects 10,000 faults, in about five minutes on two idle cores. In the environment:

    FAULT_SEED=N          another seed
    FAULT_COUNT=N         how many faults in all, instead of 600 or 10,000
    FAULT_ONLY=NAME:N     one fault alone, by its setting and its number

    plan.py       which system call fails, and how: memory that the test shares with the program
    launcher.py   fumi-core, its system calls failing by that plan
    program.py    starts, kills and observes that program
    clients.py    letters, and clients that send them well or badly
    next_hop.py   a next hop that dies in any state, and knows what it took
    cases.py      the fault of a number: what fails, in which call or state, and what the clients do
    campaign.py   runs the faults of a setting one after another, and checks the claims
"""
