"""Replies of the edge, and of the small backend, that many tests expect."""

from __future__ import annotations

READY = [b"220 2.0.0 Ready to start TLS\r\n"]
ENDED = b"421 4.3.2 Service not available, closing connection\r\n"
GREETED = [b"250-backend.test\r\n", b"250-PIPELINING\r\n", b"250-SIZE 1000\r\n", b"250 STARTTLS\r\n"]
