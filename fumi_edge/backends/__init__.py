"""Backends: choosing one, connecting to it, and checking whether it is up."""
