"""Sockets, timeouts and flow control around one dialogue for each client."""
