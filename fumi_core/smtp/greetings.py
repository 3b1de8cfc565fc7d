"""The banner, and the replies to HELO, EHLO and HELP. They are the same for all clients, so each is encoded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from fumi_core.smtp import xclient
from fumi_core.smtp.grammar import VERBS
from fumi_core.smtp.options import Options
from fumi_core.smtp.replies import Reply


class Greetings:
    """A server's greetings. They offer what its options allow, except what ``not_offered()`` returns at that moment."""

    def __init__(
        self,
        options: Options,
        withheld: Callable[[], frozenset[str]] = frozenset,
        not_offered: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """Both functions return EHLO keywords, or ``AUTH`` and a mechanism. See ``Fumi.withhold``.

        Parameters of ``withheld`` extensions are rejected too.
        """
        self.withheld = withheld
        self._not_offered = not_offered
        self._options = options
        self._ehlo: dict[tuple[bool, bool, bool, frozenset[str]], Reply] = {}

    @cached_property
    def banner(self) -> Reply:
        options = self._options
        return Reply(220, f"{options.name} {'LMTP' if options.lmtp else 'ESMTP'} {options.banner}".rstrip())

    @cached_property
    def helo(self) -> Reply:
        return Reply(250, self._options.name)

    @cached_property
    def help(self) -> Reply:
        """The reply to HELP: the supported commands."""
        options = self._options
        unknown = {"HELO", "EHLO"} if options.lmtp else {"LHLO"}
        unknown.update(options.disabled_commands, ["STARTTLS"] * options.hide_starttls, ["BDAT"] * (not options.chunking))
        unknown.update(["XCLIENT"] * (not options.use_xclient), ["XFORWARD"] * (not options.use_xforward))
        verbs = " ".join(verb for verb in VERBS if verb not in unknown)
        return Reply(214, f"See RFC 5321 for the commands: {verbs}", "2.0.0")

    def ehlo(self, secure: bool, auth: bool, trusted: bool) -> Reply:
        """The server's name, and its extensions, one per line (RFC 5321 §4.1.1.1).

        ``auth`` tells whether AUTH is offered, ``trusted`` whether XCLIENT and XFORWARD are.
        """
        key = secure, auth, trusted, self._not_offered()
        if key not in self._ehlo:
            self._ehlo[key] = Reply(250, "\n".join([self._options.name, *self._extensions(*key)]))
        return self._ehlo[key]

    def _extensions(self, secure: bool, auth: bool, trusted: bool, not_offered: frozenset[str]) -> list[str]:
        options = self._options
        methods = [method for method in options.auth_methods if f"AUTH {method}" not in not_offered]
        auth = auth and bool(methods) and "AUTH" not in options.disabled_commands
        offered = [
            ("PIPELINING", not options.hide_pipelining),
            (f"SIZE {options.size}" if options.size else "SIZE", not options.hide_size),
            ("8BITMIME", not options.hide_8bitmime),
            ("ENHANCEDSTATUSCODES", not options.hide_enhancedstatuscodes),
            ("DSN", not options.hide_dsn),
            ("SMTPUTF8", not options.hide_smtputf8),
            ("CHUNKING", options.chunking),
            ("BINARYMIME", options.chunking),
            ("REQUIRETLS", secure and not options.hide_requiretls),
            (f"LIMITS RCPTMAX={options.max_recipients}", True),
            (f"AUTH {' '.join(methods)}", auth),
            (" ".join(["XCLIENT", *xclient.XCLIENT]), trusted and options.use_xclient),
            (" ".join(["XFORWARD", *xclient.XFORWARD]), trusted and options.use_xforward),
        ]
        return [keyword for keyword, shown in offered if shown and keyword not in not_offered]
