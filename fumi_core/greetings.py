"""What a server says of itself: the banner, and the answers to HELO and EHLO. The same for all clients, so encoded once."""

from __future__ import annotations

from functools import cached_property

from fumi_core import xclient
from fumi_core.options import Options
from fumi_core.replies import Reply


class Greetings:
    """A server's greetings, as its options want them."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._ehlo: dict[tuple[bool, bool, bool], Reply] = {}

    @cached_property
    def banner(self) -> Reply:
        options = self._options
        return Reply(220, f"{options.name} {'LMTP' if options.lmtp else 'ESMTP'} {options.banner}".rstrip())

    @cached_property
    def helo(self) -> Reply:
        return Reply(250, self._options.name)

    def ehlo(self, secure: bool, auth: bool, trusted: bool) -> Reply:
        """The name, and the extensions, a line each (RFC 5321 §4.1.1.1).

        ``auth`` tells whether AUTH would be heard, ``trusted`` whether XCLIENT and XFORWARD would.
        """
        key = secure, auth, trusted
        if key not in self._ehlo:
            self._ehlo[key] = Reply(250, "\n".join([self._options.name, *self._extensions(*key)]))
        return self._ehlo[key]

    def _extensions(self, secure: bool, auth: bool, trusted: bool) -> list[str]:
        options = self._options
        offered = [
            ("PIPELINING", not options.hide_pipelining),
            (f"SIZE {options.size}" if options.size else "SIZE", not options.hide_size),
            ("8BITMIME", not options.hide_8bitmime),
            ("ENHANCEDSTATUSCODES", not options.hide_enhancedstatuscodes),
            ("DSN", not options.hide_dsn),
            ("SMTPUTF8", not options.hide_smtputf8),
            ("CHUNKING", not options.hide_chunking),
            ("BINARYMIME", not options.hide_chunking),
            ("REQUIRETLS", secure and not options.hide_requiretls),
            (f"LIMITS RCPTMAX={options.max_recipients}", True),
            (f"AUTH {' '.join(options.auth_methods)}", auth and bool(options.auth_methods)),
            (" ".join(["XCLIENT", *xclient.XCLIENT]), trusted and options.use_xclient),
            (" ".join(["XFORWARD", *xclient.XFORWARD]), trusted and options.use_xforward),
        ]
        return [keyword for keyword, shown in offered if shown]
