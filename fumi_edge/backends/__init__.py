"""Where clients are taken: which backend, how it is reached, and whether it is up."""
