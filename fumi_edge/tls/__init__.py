"""Certificates, and the TLS that is negotiated with them."""
