"""HTML and SVG as trees of xml.etree, which escapes all text when they are serialized."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

Content = Element | str
"""The content of an element."""


def element(tag: str, *content: Content | Iterable[Content], **attributes: object) -> Element:
    """An element. ``class_`` sets class, an underscore inside a name becomes a hyphen, and attributes with None are left out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), str(value))
    for each in content:
        for part in [each] if isinstance(each, Element | str) else each:
            _append(made, part)
    return made


def _append(parent: Element, part: Content) -> None:
    if isinstance(part, Element):
        parent.append(part)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + part
    else:
        parent.text = (parent.text or "") + part


def document(root: Element) -> str:
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def policy(style: str) -> str:
    """A Content-Security-Policy that allows a document this one embedded style sheet and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
