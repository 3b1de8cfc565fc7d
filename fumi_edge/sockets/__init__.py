"""Waiting for raw non-blocking sockets, and closing them."""
