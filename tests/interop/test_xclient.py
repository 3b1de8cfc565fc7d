"""XCLIENT (https://www.postfix.org/XCLIENT_README.html) as swaks speaks it: offered, believed and answered as Postfix would."""

from __future__ import annotations

import re
import smtplib
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.interop.starting import StartCore
from tests.support.programs import Programs

TRUSTED = {"use_xclient": True, "trusted_proxies": ("127.0.0.1/32",)}
STRANGER = {"use_xclient": True, "trusted_proxies": ("192.0.2.0/24",)}


@pytest.fixture
def swaks(programs: Programs) -> Callable[..., str]:
    """Sends a message; what was said. The server's lines begin with <-, its refusals with <**."""

    def send(port: int, *flags: str, status: int = 0) -> str:
        common = ["--server", "127.0.0.1", "--port", str(port), "--from", "a@b.example", "--to", "c@d.example"]
        said: str = programs.run("swaks", *common, "--ehlo", "client.example", *flags, status=status)
        return said

    return send


def after_xclient(said: str) -> str:
    """The first line of the server's answer to XCLIENT."""
    found = re.search(r"^ -> XCLIENT .*\n(.*)$", said, re.MULTILINE)
    assert found, said
    return found[1]


def test_the_messages_client_is_the_one_that_a_trusted_client_names(core: StartCore, swaks: Callable[..., str]) -> None:
    server = core(**TRUSTED)
    said = swaks(server.port, "--xclient-addr", "192.0.2.1", "--xclient-port", "4321", "--xclient-name", "there.example")
    # As after a connection: the banner, and the dialogue from its start (swaks says EHLO again).
    assert after_xclient(said).startswith("<-  220 mx.example ESMTP")
    session = server.messages[0].session
    assert (session.remote_address, session.remote_port) == ("192.0.2.1", 4321)
    assert session.xclient["NAME"] == "there.example"
    assert session.received_header().startswith("Received: from client.example ([192.0.2.1])\r\n")


def test_ipv6_has_its_prefix(core: StartCore, swaks: Callable[..., str]) -> None:
    server = core(**TRUSTED)
    swaks(server.port, "--xclient-addr", "IPV6:2001:db8::1")
    assert server.messages[0].session.remote_address == "2001:db8::1"


@pytest.mark.parametrize("unknown", ["[UNAVAILABLE]", "[TEMPUNAVAIL]"])
def test_a_name_may_be_unknown(core: StartCore, swaks: Callable[..., str], unknown: str) -> None:
    server = core(**TRUSTED)
    swaks(server.port, "--xclient-addr", "192.0.2.1", "--xclient-name", unknown)
    assert server.messages[0].session.remote_address == "192.0.2.1"


def test_a_login_is_an_authentication(core: StartCore, swaks: Callable[..., str]) -> None:
    server = core(**TRUSTED, auth_optional=False)
    swaks(server.port, "--xclient-addr", "192.0.2.1", "--xclient-login", "joe")
    session = server.messages[0].session
    assert (session.user, session.transmission_type) == ("joe", "ESMTPA")


def test_several_commands_add_up(core: StartCore, swaks: Callable[..., str]) -> None:
    server = core(**{**TRUSTED, "trusted_proxies": ("127.0.0.1/32", "192.0.2.1/32")})
    swaks(server.port, "--xclient-port", "4321", "--xclient-delim", "--xclient-addr", "192.0.2.1")
    assert (server.messages[0].session.remote_address, server.messages[0].session.remote_port) == ("192.0.2.1", 4321)


@pytest.mark.parametrize("options", [STRANGER, {**TRUSTED, "use_xclient": False}])
def test_where_it_is_not_offered_the_client_stays_who_it_is(
    core: StartCore, swaks: Callable[..., str], options: dict[str, Any]
) -> None:
    server = core(**options)
    said = swaks(server.port, "--xclient-addr", "192.0.2.1", "--xclient-optional")
    assert "-XCLIENT" not in said
    assert server.messages[0].session.remote_address == "127.0.0.1"


def test_a_stranger_that_says_it_all_the_same_is_refused(core: StartCore) -> None:
    server = core(**STRANGER)
    with smtplib.SMTP("127.0.0.1", server.port) as smtp:
        refused(smtp)
        smtp.sendmail("a@b.example", ["c@d.example"], "hi")
    assert server.messages[0].session.remote_address == "127.0.0.1"


def test_behind_a_proxy_it_is_the_client_that_must_be_trusted(core: StartCore) -> None:
    server = core(**TRUSTED, proxy_protocol="required")
    with socket.create_connection(("127.0.0.1", server.port)) as sock, smtplib.SMTP() as smtp:
        sock.sendall(b"PROXY TCP4 198.51.100.7 192.0.2.2 4321 25\r\n")
        smtp.sock = sock
        assert smtp.getreply()[0] == 220
        refused(smtp)
        smtp.sendmail("a@b.example", ["c@d.example"], "hi")
    assert server.messages[0].session.remote_address == "198.51.100.7"


def refused(smtp: smtplib.SMTP) -> None:
    smtp.ehlo()
    assert not smtp.has_extn("xclient")
    code, said = smtp.docmd("XCLIENT", "ADDR=192.0.2.1")
    assert (code, said[:6]) == (550, b"5.7.0 ")


@pytest.mark.parametrize("attributes", ["ADDR", "ADDR=", "ADDR=elsewhere", "ADDR=192.0.2.256", "PORT=x", "COLOUR=red"])
def test_what_is_not_an_attribute_is_refused(core: StartCore, swaks: Callable[..., str], attributes: str) -> None:
    server = core(**TRUSTED)
    said = swaks(server.port, "--xclient", attributes, "--xclient-no-verify", "--xclient-optional")
    assert after_xclient(said).startswith("<** 501 5.5.4 ")
    assert server.messages[0].session.remote_address == "127.0.0.1"
