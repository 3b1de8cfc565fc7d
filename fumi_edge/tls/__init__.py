"""Certificates, and what is negotiated with them."""
