"""Comparing mail domains: two spellings of one internationalized domain are one domain (RFC 5890 §2.3.2.4, RFC 5895)."""

from __future__ import annotations

import unicodedata

_PREFIX = "xn--"
_DOTS = str.maketrans("\u3002\uff0e\uff61", "...")


def canonical(domain: str) -> str:
    """The domain in lower case, with A-labels for its U-labels: equal for two spellings of one domain.

    The standard library's codec is IDNA 2003, for which "straße.example" and "strasse.example" are one domain; they are two. So
    labels are compared in the form of IDNA 2008: NFC and lower case. A string that is not a domain name is returned in lower
    case.
    """
    domain = domain.lower()
    if domain.isascii():
        return domain
    return ".".join(map(_a_label, domain.translate(_DOTS).split(".")))


def _a_label(label: str) -> str:
    # A label that begins with xn-- stays unchanged: it is an A-label, or must not become the name of another domain.
    if label.startswith(_PREFIX):
        return label
    unicode = unicodedata.normalize("NFKC", label).lower()
    return unicode if unicode.isascii() else _PREFIX + unicode.encode("punycode").decode("ascii")
