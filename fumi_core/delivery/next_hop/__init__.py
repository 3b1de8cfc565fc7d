"""Delivery to another server by SMTP or LMTP, and the store of its replies."""
