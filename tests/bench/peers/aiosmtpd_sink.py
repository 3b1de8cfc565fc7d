"""aiosmtpd as its documentation starts it, with the handler of its own that discards: `aiosmtpd_sink.py PORT [CERT KEY]`.

With a certificate the port speaks TLS from the first byte (SMTPS), by asyncio's own TLS transport. Runs in `.bench/aiosmtpd`.
"""

import ssl
import sys
import threading

from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Sink


def main(port: str, *certificate_and_key: str) -> None:
    """Serve until killed."""
    context = None
    if certificate_and_key:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*certificate_and_key)
    Controller(Sink(), hostname="127.0.0.1", port=int(port), ssl_context=context).start()
    threading.Event().wait()


main(*sys.argv[1:])
