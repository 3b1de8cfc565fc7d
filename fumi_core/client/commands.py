"""MAIL and RCPT for a server: with the parameters of the extensions that it offers, and no others.

A message that the server cannot carry unchanged is rejected here:

- BINARYMIME needs the server's BINARYMIME and CHUNKING (RFC 3030 §3): else 554 5.6.3.
- 8BITMIME is declared by many clients for plain ASCII, so a server without it still gets the message, as long as no byte has the
  eighth bit set; at the first such byte the transfer ends with 554 5.6.3 (RFC 6152 §3: convert, or reject).
- SMTPUTF8 is rejected with 550 5.6.7 (RFC 6531 §3.5).
- REQUIRETLS (RFC 8689 §4.2.1) is rejected with 550 5.7.30: this client has no TLS. A Unix socket and the loopback interface need
  no TLS, so a server on this host gets the message if it will itself require TLS, which it shows by offering REQUIRETLS, or if it
  is the final destination, which LMTP is for.
- DSN's parameters (RFC 3461) are left out for a server without DSN: this client sends no "relayed" reports.
- AUTH= (RFC 4954 §5) is never passed on: the server would have to trust this client about the sender.
"""

from __future__ import annotations

from collections.abc import Iterable

from fumi_core.client.connection import Dialect, NextHopConnection
from fumi_core.errors import SMTPError
from fumi_core.smtp.session import Address, Envelope

CONVERSION = ("5.6.3 Conversion required but not supported by the next hop", 554)


CARRIED = frozenset({"8BITMIME", "BINARYMIME", "DSN", "REQUIRETLS", "SMTPUTF8"})
"""Extensions that a message needs on every hop: a server may offer them only if its next hop does."""


def not_carried(connection: NextHopConnection) -> frozenset[str]:
    """The extensions of ``CARRIED`` that this server does not offer, or that this client cannot use with it."""
    offered = CARRIED & connection.extensions.keys()
    if "CHUNKING" not in connection.extensions:
        offered -= {"BINARYMIME"}
    if not connection.local:
        offered -= {"REQUIRETLS"}
    return CARRIED - offered


def mail_command(sender: Address, envelope: Envelope, connection: NextHopConnection, protocol: Dialect) -> bytes:
    """MAIL without its CRLF. Raises SMTPError if the server cannot carry the message."""
    offered = connection.extensions
    words = [f"MAIL FROM:<{sender.address}>"]
    if "SIZE" in offered:
        words += _given(sender, ("SIZE",))
    if envelope.body == "BINARYMIME":
        if not {"BINARYMIME", "CHUNKING"} <= offered.keys():
            raise SMTPError(*CONVERSION)
        words.append("BODY=BINARYMIME")
    elif envelope.body == "8BITMIME" and "8BITMIME" in offered:
        words.append("BODY=8BITMIME")
    if envelope.smtputf8:
        if "SMTPUTF8" not in offered:
            raise SMTPError("5.6.7 SMTPUTF8 is required, but was not offered by the next hop", 550)
        words.append("SMTPUTF8")
    if envelope.require_tls:
        if not connection.local or not ("REQUIRETLS" in offered or protocol == "lmtp"):
            raise SMTPError("5.7.30 REQUIRETLS support required", 550)
        words += ["REQUIRETLS"] * ("REQUIRETLS" in offered)
    if "DSN" in offered:
        words += _given(sender, ("RET", "ENVID"))
    return " ".join(words).encode()


def rcpt_command(recipient: Address, connection: NextHopConnection) -> bytes:
    """RCPT without its CRLF."""
    words = [f"RCPT TO:<{recipient.address}>"]
    if "DSN" in connection.extensions:
        words += _given(recipient, ("NOTIFY", "ORCPT"))
    return " ".join(words).encode()


def _given(address: Address, keywords: Iterable[str]) -> list[str]:
    return [f"{keyword}={address.args[keyword]}" for keyword in keywords if keyword in address.args]
