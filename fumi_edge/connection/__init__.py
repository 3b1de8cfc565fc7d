"""One client connection, from accept to its line in the log, in the order of the walk."""
