"""Random input: for what is sans-IO (the protocol, message readers, PROXY headers, the STARTTLS preamble), and for whole servers.

Every input comes from a seed and its number, so what failed once fails again. A failure names both and shows the smallest input
that was found to fail likewise. In the environment:

    FUZZ_SEED=N           another seed
    FUZZ_INPUTS=N         how many inputs in all; the default is made for every day, millions for a night
    FUZZ_ONLY=NAME:N      one input alone, by its campaign and number

    campaign.py   seeds, numbers, hanging, shrinking
    speech.py     what clients say, more or less
    conversing.py a Protocol and an application that decides by the words it is given; what was said and done
    passing.py    an event loop in which minutes of silence take no time
    model.py      what a server must have said and done, by somebody who knows nothing but framing
    world.py      a whole server, whose clock runs as fast as there is nothing to do
    wild.py       an app whose handlers go wrong in every way
"""
