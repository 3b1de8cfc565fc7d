"""The TLS side of Fumi: terminates TLS and STARTTLS and tells the SMTP server behind it, by PROXY protocol, who the client is."""

from fumi_edge.app import Fumi

__all__ = ["Fumi"]
