"""Waiting on raw non-blocking sockets, and ending them."""
