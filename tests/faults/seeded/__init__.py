"""A campaign of injected faults against fumi-core: thousands, each made from a seed and its number, each with the same claims.

Whatever fails and whoever is killed: a message answered 250 is there, each octet of it; a second copy exists only where the
client got no 250; nothing half-written is visible; the log has no traceback; the server answers again; no descriptor and no
connection is left behind. In the environment:

    FAULT_SEED=N          another seed
    FAULT_COUNT=N         how many faults in all; by default 400, and 10,000 with ``-m long``
    FAULT_ONLY=NAME:N     one fault alone, by its setting and its number

    plan.py       which system call fails, and how: memory that the test shares with the program
    launcher.py   fumi-core, its system calls failing by that plan
    program.py    starts, kills and observes that program
    clients.py    letters, and clients that send them well or badly
    next_hop.py   a next hop that dies in any state, and knows what it took
    cases.py      the fault of a number: what fails, in which call or state, and what the clients do
    campaign.py   runs the faults of a setting one after another, and checks the claims
"""
