"""Two spellings of one internationalized domain are one domain; two domains are two."""

from __future__ import annotations

import pytest

from fumi_core import Fumi, plugins
from fumi_core.smtp.domains import canonical
from fumi_core.testing import running
from tests.core.client import Connect
from tests.core.programs import Start
from tests.support.ports import free_port

U_LABEL, A_LABEL = "münchen.example", "xn--mnchen-3ya.example"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (U_LABEL, A_LABEL),
        ("MÜNCHEN.Example", "XN--MNCHEN-3YA.EXAMPLE"),
        ("mu\u0308nchen.example", A_LABEL),
        ("münchen\u3002example", A_LABEL),
        ("日本語.example", "xn--wgv71a119e.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("EXAMPLE.org", "example.org"),
    ],
)
def test_two_spellings_are_one_domain(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("straße.example", "strasse.example"),
        ("xn--example-.org", "example.org"),
        ("xn--a.example", "a.example"),
        ("münchen.example", "munchen.example"),
        ("münchen.example", "example"),
    ],
)
def test_two_domains_are_two(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)


@pytest.mark.parametrize("given", [U_LABEL, A_LABEL])
@pytest.mark.parametrize("named", [U_LABEL, A_LABEL])
def test_plugins_know_a_domain_by_both_spellings(connect: Connect, given: str, named: str) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    app.use(plugins.sender_block([given])).use(plugins.rcpt_filter([given]))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say(f"MAIL FROM:<a@{named}> SMTPUTF8").startswith(b"550 5.7.1")
        assert client.say("MAIL FROM:<> SMTPUTF8").startswith(b"250")
        assert client.say(f"RCPT TO:<a@{named}>").startswith(b"250")
        assert client.say("RCPT TO:<a@munchen.example>").startswith(b"550 5.7.1")


@pytest.mark.parametrize("given", [U_LABEL, A_LABEL])
def test_the_program_knows_its_domains_by_both_spellings(start: Start, connect: Connect, given: str) -> None:
    port = free_port()
    start("--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off", "--deliver", "discard:", "--domain", given)
    client = connect(port)
    client.say("EHLO x")
    assert client.say("MAIL FROM:<> SMTPUTF8").startswith(b"250")
    for named in (U_LABEL, A_LABEL):
        assert client.say(f"RCPT TO:<a@{named}>").startswith(b"250")
    assert client.say("RCPT TO:<a@other.example>").startswith(b"550 5.7.1")
