"""Delivery to another server by SMTP or LMTP, and the memory of its answers."""
