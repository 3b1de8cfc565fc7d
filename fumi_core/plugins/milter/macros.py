"""The macros that a filter gets: by default those of Postfix (MILTER_README), otherwise those that it has requested."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fumi_core.plugins.milter.agreement import Agreement, Stage
from fumi_core.smtp.session import Address, Session
from fumi_core.version import VERSION

DEFAULT = {
    Stage.CONNECT: ["j", "{daemon_name}", "{daemon_addr}", "v", "_"],
    Stage.HELO: ["{tls_version}", "{cipher}", "{cipher_bits}", "{cert_subject}", "{cert_issuer}"],
    Stage.MAIL: ["i", "{auth_type}", "{auth_authen}", "{auth_author}", "{mail_addr}", "{mail_host}", "{mail_mailer}"],
    Stage.RCPT: ["i", "{rcpt_addr}", "{rcpt_host}", "{rcpt_mailer}"],
    Stage.DATA: ["i"],
    Stage.END_OF_HEADER: ["i"],
    Stage.END_OF_MESSAGE: ["i"],
}

_BITS = re.compile(r"AES_?(128|256)|(CHACHA20)")


def macros_for(
    stage: Stage, agreement: Agreement, session: Session, login: Callable[[Any], str], address: Address | None = None
) -> dict[str, str]:
    """Each macro of this stage that has a value. ``address`` is that of MAIL or RCPT; ``login`` returns the name of a user."""
    names = agreement.macros.get(stage, DEFAULT.get(stage, []))
    if not names:
        return {}
    values = _values(session, login)
    sender = address if stage is Stage.MAIL else session.envelope.mail_from
    if sender is not None:
        values |= _of_address("mail", sender, "smtp")
    if stage is Stage.RCPT and address is not None:
        values |= _of_address("rcpt", address, "local")
    return {name: value for name in names if (value := values.get(name if len(name) == 1 else f"{{{name.strip('{}')}}}"))}


def client_name(session: Session) -> str:
    """The client's host name, if a trusted proxy knows it; otherwise ``unknown``, as in Postfix."""
    return session.xclient.get("NAME") or "unknown"


def _values(session: Session, login: Callable[[Any], str]) -> dict[str, str | None]:
    name = client_name(session)
    values: dict[str, str | None] = {
        "i": session.id,
        "j": session.name,
        "v": f"Fumi {VERSION}",
        "_": f"{name} [{session.remote_address}]",
        "{daemon_name}": session.name,
        "{daemon_addr}": session.local_address,
        "{daemon_port}": str(session.local_port),
        "{client_addr}": session.remote_address,
        "{client_name}": name,
        "{client_ptr}": name,
        "{client_port}": str(session.remote_port),
    }
    if session.user is not None:
        # A user that a trusted proxy names by XCLIENT has authenticated elsewhere.
        values |= {"{auth_type}": session.auth_method or "XCLIENT", "{auth_authen}": login(session.user)}
    if session.tls is not None:
        cipher = session.tls.cipher or ""
        bits = _BITS.search(cipher)
        values |= {"{tls_version}": session.tls.version, "{cipher}": cipher, "{cipher_bits}": bits and (bits[1] or "256")}
        if session.tls.client_cert_verified:
            values["{cert_subject}"] = session.tls.client_cn
    return values


def _of_address(prefix: str, address: Address, mailer: str) -> dict[str, str | None]:
    host = address.address.rpartition("@")[2] if "@" in address.address else ""
    return {f"{{{prefix}_addr}}": address.address, f"{{{prefix}_host}}": host, f"{{{prefix}_mailer}}": mailer}
