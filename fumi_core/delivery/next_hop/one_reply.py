"""One reply made of several: the client speaks SMTP, and the next hop replies for each recipient (RFC 2033 §4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fumi_core.client.replies import STATUS
from fumi_core.errors import SMTPError

MAX_QUOTED = 10
"""Replies that the joint reply quotes at most."""


def agree(errors: Iterable[SMTPError | None]) -> bool:
    """Whether the message was accepted for all recipients (None), deferred for all, or rejected for all."""
    return len({error.code // 100 if error else 2 for error in errors}) == 1


def joint_error(errors: Mapping[str, SMTPError]) -> SMTPError:
    """The reply when the message was deferred for all recipients, or rejected for all.

    Replies with the same code and enhanced status code become the lines of one reply; others are quoted.
    """
    distinct = list({(error.code, error.message): error for error in errors.values()}.values())
    if len(distinct) == 1:
        return distinct[0]
    kinds = {(error.code, match[0] if (match := STATUS.match(error.message)) else "") for error in distinct}
    if len(kinds) == 1:
        ((code, status),) = kinds
        return SMTPError(status + "\n".join(error.message.removeprefix(status) for error in distinct[:MAX_QUOTED]), code)
    code, status = (451, "4.2.0") if distinct[0].code < 500 else (554, "5.2.0")
    return SMTPError(f"{status} Not delivered to any recipient{_quotes(errors)}", code)


def mixed_error(errors: Mapping[str, SMTPError | None]) -> SMTPError:
    """The reply when the next hop's replies differ: the client keeps the message, and sends it again."""
    failed = {recipient: error for recipient, error in errors.items() if error is not None}
    delivered = f"Delivered to {len(errors) - len(failed)} of {len(errors)} recipients, try again later for the others"
    return SMTPError(f"4.2.0 {delivered}{_quotes(failed)}", 451)


def _quotes(errors: Mapping[str, SMTPError]) -> str:
    """One line for each of the first recipients."""
    first = list(errors.items())[:MAX_QUOTED]
    return "".join(f"\n<{recipient}>: {error.code} {error.message.partition(chr(10))[0]}" for recipient, error in first)
