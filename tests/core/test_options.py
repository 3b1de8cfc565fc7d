"""Every option of Fumi: what it does, and what it may not be. Each test fails when its option does nothing."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any, Literal

import pytest

from fumi_core import Fumi
from fumi_core.cli import main
from fumi_core.smtp.events import MessageEnd, MessageExcess
from fumi_core.smtp.grammar import VERBS
from fumi_core.smtp.greetings import Greetings
from fumi_core.smtp.options import DECLARATIONS, Options
from fumi_core.smtp.protocol import Protocol
from fumi_core.smtp.replies import OK, SIZE_EXCEEDED
from fumi_core.smtp.session import Session
from fumi_core.smtp.tally import Tally
from fumi_core.testing import running
from tests.core.client import Connect

OPTIONS = list(DECLARATIONS)
ENVELOPE = b"MAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\n"


def replies(said: bytes, *, secure: bool = False, authenticates: bool = False, user: object = None, **options: Any) -> list[str]:
    """What a server with these options, whose handlers are content with all, answers to a client that greeted it: a line each."""
    read = Options(**{"auth_optional": True, "name": "mx.example", **options})
    session = Session("1", read.name)
    session.secure, session.user = secure, user
    protocol = Protocol(session, read, Greetings(read), Tally(), authenticates=authenticates, trusted=True)
    protocol.receive((b"" if said[1:4] == b"HLO" else b"EHLO x\r\n") + said)
    protocol.accept()
    verdict = OK
    while (event := protocol.next_event()) is not None:
        if isinstance(event, MessageExcess):
            verdict = SIZE_EXCEEDED
        elif isinstance(event, MessageEnd):
            protocol.settle([verdict])
        elif protocol.pending is event:
            protocol.accept()
    return protocol.take_output().decode().splitlines()


def answer(said: bytes, **options: Any) -> str:
    """The last of them."""
    return replies(said, **options)[-1]


def offers(keyword: str, **options: Any) -> bool:
    return any(line[4:].split(" ")[0] == keyword for line in replies(b"", **options) if line[:3] == "250")


def given(option: str, value: object) -> dict[str, Any]:
    """An argument that no type checker may look at, for it is of a wrong type or name."""
    return {option: value}


def test_every_option_has_a_test_that_bears_its_name() -> None:
    tests = [name for name, _ in inspect.getmembers(sys.modules[__name__], inspect.isfunction)]
    untested = [option for option in OPTIONS if not any(test.startswith(f"test_{option}_") for test in tests)]
    assert untested == []


def test_require_tls_requires_it_for_mail_and_auth() -> None:
    for said in (b"MAIL FROM:<>\r\n", b"AUTH PLAIN\r\n"):
        for required, secure in ((False, False), (True, True)):
            heard = answer(said, authenticates=True, allow_insecure_auth=True, require_tls=required, secure=secure)
            assert heard.startswith(("250", "334"))
        heard = answer(said, authenticates=True, allow_insecure_auth=True, require_tls=True)
        assert heard == "530 5.7.0 Must issue a STARTTLS command first"


def test_auth_methods_are_offered_and_no_others_accepted() -> None:
    options: dict[str, Any] = {"authenticates": True, "secure": True, "auth_methods": ["cram-md5", "XOAUTH2"]}
    assert "250 AUTH CRAM-MD5 XOAUTH2" in replies(b"", **options)
    assert answer(b"AUTH CRAM-MD5\r\n", **options).startswith("334")
    assert answer(b"AUTH PLAIN\r\n", **options).startswith("504")


def test_auth_optional_accepts_mail_without_authentication() -> None:
    assert answer(b"MAIL FROM:<>\r\n", auth_optional=True).startswith("250")
    assert answer(b"MAIL FROM:<>\r\n", auth_optional=False).startswith("530")
    assert answer(b"MAIL FROM:<>\r\n", auth_optional=False, user="joe").startswith("250")


def test_allow_insecure_auth_offers_and_accepts_auth_without_tls() -> None:
    for allowed, code in ((False, "538 5.7.11"), (True, "334")):
        assert offers("AUTH", authenticates=True, allow_insecure_auth=allowed) is allowed
        assert answer(b"AUTH PLAIN\r\n", authenticates=True, allow_insecure_auth=allowed).startswith(code)


def test_size_is_offered_and_a_larger_declared_size_is_rejected() -> None:
    assert "250-SIZE 1000" in replies(b"", size=1000)
    assert answer(b"MAIL FROM:<> SIZE=1001\r\n", size=1000).startswith("552 5.3.4")
    assert answer(b"MAIL FROM:<> SIZE=1001\r\n", size=None).startswith("250")


def test_size_holds_for_chunks() -> None:
    assert answer(ENVELOPE + b"BDAT 11 LAST\r\nhello wor\r\n", size=10).startswith("552 5.3.4")


def test_max_clients_are_admitted_and_one_more_is_421(connect: Connect) -> None:
    with running(Fumi(max_clients=1, close_timeout=0.2)) as server:
        assert connect(server.port).banner.startswith(b"220")
        assert connect(server.port).banner.startswith(b"421 4.7.0")


def test_name_is_in_the_banner_and_the_greeting() -> None:
    assert replies(b"", name="own.example")[:2] == ["220 own.example ESMTP", "250-own.example"]
    assert replies(b"HELO x\r\n", name="own.example")[-1] == "250 own.example"


def test_banner_follows_the_name() -> None:
    assert replies(b"", banner="at your service")[0] == "220 mx.example ESMTP at your service"


def test_disabled_commands_are_not_implemented() -> None:
    assert answer(b"VRFY root\r\n", disabled_commands=["vrfy"]).startswith("502")
    assert "VRFY" not in answer(b"HELP\r\n", disabled_commands=["vrfy"])
    assert answer(b"VRFY root\r\n").startswith("252")


def test_disabled_commands_remove_their_extensions() -> None:
    for verb, keyword in (("AUTH", "AUTH"), ("BDAT", "CHUNKING"), ("BDAT", "BINARYMIME")):
        assert offers(keyword, secure=True, authenticates=True)
        assert not offers(keyword, secure=True, authenticates=True, disabled_commands=[verb])


def test_disabled_commands_with_auth_require_no_authentication() -> None:
    said = b"NOOP\r\n" * 20 + b"MAIL FROM:<>\r\n"
    assert answer(said, auth_optional=False, disabled_commands=["AUTH"]).startswith("250")
    assert answer(said, auth_optional=False).startswith("421")


def test_hide_starttls_makes_it_an_unknown_command() -> None:
    assert answer(b"STARTTLS\r\n").startswith("502")
    assert "STARTTLS" in answer(b"HELP\r\n").split()
    assert answer(b"STARTTLS\r\n", hide_starttls=True) == "500 5.5.2 Error: command not recognized"
    assert "STARTTLS" not in answer(b"HELP\r\n", hide_starttls=True).split()


def test_hide_size_removes_the_keyword_only() -> None:
    assert offers("SIZE")
    assert not offers("SIZE", hide_size=True)
    assert answer(b"MAIL FROM:<> SIZE=1001\r\n", hide_size=True, size=1000).startswith("552")


def test_hide_pipelining_removes_the_keyword() -> None:
    assert offers("PIPELINING")
    assert not offers("PIPELINING", hide_pipelining=True)


def test_hide_enhancedstatuscodes_removes_them_from_replies() -> None:
    assert offers("ENHANCEDSTATUSCODES")
    assert not offers("ENHANCEDSTATUSCODES", hide_enhancedstatuscodes=True)
    assert answer(b"NOOP\r\n", hide_enhancedstatuscodes=True) == "250 Ok"


@pytest.mark.parametrize("parameter", [b"MAIL FROM:<> RET=HDRS", b"MAIL FROM:<>\r\nRCPT TO:<a@b.example> NOTIFY=NEVER"])
def test_hide_dsn_rejects_its_parameters_too(parameter: bytes) -> None:
    assert offers("DSN")
    assert not offers("DSN", hide_dsn=True)
    assert answer(parameter + b"\r\n").startswith("250")
    assert answer(parameter + b"\r\n", hide_dsn=True).startswith("555")


def test_hide_requiretls_rejects_its_parameter_too() -> None:
    assert offers("REQUIRETLS", secure=True)
    assert not offers("REQUIRETLS", secure=True, hide_requiretls=True)
    assert answer(b"MAIL FROM:<> REQUIRETLS\r\n", secure=True).startswith("250")
    assert answer(b"MAIL FROM:<> REQUIRETLS\r\n", secure=True, hide_requiretls=True).startswith("555")


def test_hide_8bitmime_removes_the_keyword() -> None:
    assert offers("8BITMIME")
    assert not offers("8BITMIME", hide_8bitmime=True)


def test_hide_smtputf8_rejects_its_parameter_too() -> None:
    assert offers("SMTPUTF8")
    assert not offers("SMTPUTF8", hide_smtputf8=True)
    assert answer(b"MAIL FROM:<> SMTPUTF8\r\n").startswith("250")
    assert answer(b"MAIL FROM:<> SMTPUTF8\r\n", hide_smtputf8=True).startswith("555")


def test_hide_chunking_rejects_bdat_and_binarymime_too() -> None:
    for keyword in ("CHUNKING", "BINARYMIME"):
        assert offers(keyword)
        assert not offers(keyword, hide_chunking=True)
    assert answer(ENVELOPE + b"BDAT 2\r\nhi").startswith("250")
    assert answer(ENVELOPE + b"BDAT 2\r\n", hide_chunking=True).startswith("502")
    assert answer(b"MAIL FROM:<> BODY=BINARYMIME\r\n", hide_chunking=True).startswith("555")
    assert "BDAT" not in answer(b"HELP\r\n", hide_chunking=True)


def test_lmtp_requires_lhlo() -> None:
    assert replies(b"LHLO x\r\n", lmtp=True)[:2] == ["220 mx.example LMTP", "250-mx.example"]
    assert answer(b"EHLO x\r\n", lmtp=True).startswith("500")
    assert answer(b"LHLO x\r\n").startswith("500")
    assert "LHLO" in answer(b"HELP\r\n", lmtp=True)
    assert "LHLO" not in answer(b"HELP\r\n")


def test_proxy_protocol_required_waits_for_a_header(connect: Connect) -> None:
    settings: tuple[tuple[Literal["off", "required"], bytes], ...] = (("required", b""), ("off", b"220"))
    for setting, banner in settings:
        with running(Fumi(proxy_protocol=setting, close_timeout=0.2)) as server:
            assert connect(server.port, b"NOOP\r\n").banner[:3] == banner
    with running(Fumi(proxy_protocol="required", close_timeout=0.2)) as server:
        assert connect(server.port, b"PROXY UNKNOWN\r\n").banner.startswith(b"220")


def test_trusted_proxies_alone_may_send_a_header(connect: Connect) -> None:
    for trusted, banner in ((["192.0.2.0/24"], b""), (["127.0.0.1"], b"220")):
        with running(Fumi(proxy_protocol="required", trusted_proxies=trusted, close_timeout=0.2)) as server:
            client = connect(server.port, banner=False)
            try:
                client.sock.sendall(b"PROXY UNKNOWN\r\n")
                assert client.reply()[:3] == banner
            except ConnectionError:
                assert banner == b""


def test_assume_tls_makes_every_session_secure(connect: Connect) -> None:
    for assumed in (False, True):
        with running(Fumi(assume_tls=assumed, close_timeout=0.2)) as server:
            assert (b"REQUIRETLS" in connect(server.port).say("EHLO x")) is assumed


@pytest.mark.parametrize(("setting", "code"), [("reject", "550 5.6.11"), ("normalize", "250")])
def test_bare_newlines_are_rejected_or_normalized(setting: str, code: str) -> None:
    assert answer(ENVELOPE + b"BDAT 4\r\na\nb\n", bare_newlines=setting).startswith(code)


def test_lenient_addresses_accepts_addresses_that_devices_send() -> None:
    for lenient in (True, False):
        assert answer(b"MAIL FROM:root\r\n", lenient_addresses=lenient).startswith("250" if lenient else "501")


def test_max_recipients_is_announced_and_one_more_rejected() -> None:
    assert "250 LIMITS RCPTMAX=1" in replies(b"", max_recipients=1)
    said = ENVELOPE + b"RCPT TO:<c@d.example>\r\n"
    assert answer(said, max_recipients=1).startswith("452 4.5.3")
    assert answer(said, max_recipients=2).startswith("250")


def test_max_errors_are_tolerated_and_one_more_is_421() -> None:
    heard = replies(b"BOGUS\r\n" * 3 + b"NOOP\r\n", max_errors=2)[-3:]
    assert [line[:3] for line in heard] == ["500", "500", "421"]
    assert replies(b"BOGUS\r\n", max_errors=0)[-1].startswith("421 4.7.0")


def test_max_unauthenticated_commands_are_answered_and_one_more_is_421() -> None:
    heard = replies(b"NOOP\r\n" * 3, max_unauthenticated_commands=3, auth_optional=False)[-3:]
    assert [line[:3] for line in heard] == ["250", "250", "421"]


def test_socket_timeout_ends_a_silence(connect: Connect) -> None:
    with running(Fumi(socket_timeout=0.1, close_timeout=0.2)) as server:
        assert connect(server.port).reply().startswith(b"421 4.4.2")


def test_data_timeout_ends_a_message_that_does_not_end(connect: Connect) -> None:
    with running(Fumi(auth_optional=True, data_timeout=0.1, close_timeout=0.2)) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.reply().startswith(b"421 4.4.2")


def test_proxy_timeout_ends_the_wait_for_a_header(connect: Connect) -> None:
    patient, hasty = (Fumi(proxy_protocol="required", proxy_timeout=seconds, close_timeout=0.2) for seconds in (60, 0.1))
    with running(patient) as first, running(hasty) as second:
        waiting = connect(first.port, banner=False)
        assert connect(second.port).banner == b""
        waiting.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting.sock.recv(1)


def test_close_timeout_is_what_a_transaction_gets(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.0)
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        server.run(app.close)  # which waits 30 seconds by default, and then longer than a test may
        assert client.reply().startswith(b"421 4.3.2")


def test_logger_logs_sessions(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    own = logging.getLogger("own")
    for setting, name in ((False, None), (True, "fumi.core"), (own, "own")):
        caplog.clear()
        with caplog.at_level(logging.INFO), running(Fumi(auth_optional=True, logger=setting, close_timeout=0.2)) as server:
            connect(server.port).say("QUIT")
        assert [record.name for record in caplog.records] == ([name] if name else [])


# What they may not be


def of_type(kind: type) -> list[str]:
    return [option.name for option in DECLARATIONS.values() if type(option.default) is kind]


FLAGS, SECONDS = [option for option in of_type(bool) if option != "logger"], of_type(float)
TEXTS = ["name", "banner", "proxy_protocol", "bare_newlines"]
COUNTS = ["size", "max_clients", *of_type(int)]
LISTS = of_type(tuple)


def test_every_option_is_of_one_of_these_kinds() -> None:
    assert sorted([*FLAGS, *SECONDS, *TEXTS, *COUNTS, *LISTS, "logger"]) == sorted(OPTIONS)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (FLAGS, ("yes", 1, None)),
        (SECONDS, ("10", None, True)),
        (TEXTS, (None, True, b"mx.example", ["mx.example"])),
        (COUNTS, ("10", 1e3, True)),
        (LISTS, ("PLAIN", b"PLAIN", None, [1], 5)),
        (["logger"], ("yes", None, 1)),
    ],
)
def test_a_value_of_a_wrong_type_is_a_type_error_that_names_the_option(options: list[str], wrong: tuple[object, ...]) -> None:
    for option in options:
        for value in wrong:
            with pytest.raises(TypeError, match=f"^{option} is .*, not "):
                Fumi(**given(option, value))


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("size", 0, "of at least 1, not 0; None means no limit"),
        ("max_clients", -1, "of at least 1"),
        ("max_recipients", 0, "from 1 to 999999"),
        ("max_recipients", 1_000_000, "from 1 to 999999"),
        ("max_errors", -1, "of at least 0"),
        ("max_unauthenticated_commands", 0, "of at least 1"),
        *((option, value, "a number of seconds") for option in SECONDS for value in (-1, float("nan"), float("inf"))),
        *((option, 0, "above 0") for option in SECONDS if option != "close_timeout"),
        *(("name", value, "a host name in ASCII") for value in ("", "two words", "a\r\nb", "bücher.example", "a" * 256, "a\0")),
        *(("banner", value, "printable ASCII") for value in ("a\r\n250 forged", "grüß Gott", "\t", "a\0", "a\x7f")),
        ("disabled_commands", ["BOGUS"], "'BOGUS' is not one of HELO, "),
        ("auth_methods", ["PLAIN", "GSSAPI"], "'GSSAPI' is not one of PLAIN, LOGIN, CRAM-MD5, XOAUTH2"),
        ("trusted_proxies", ["localhost"], "write 192.0.2.0/24"),
        ("proxy_protocol", "on", "'off' or 'required'"),
        ("bare_newlines", "keep", "'reject' or 'normalize'"),
    ],
)
def test_a_value_that_cannot_be_is_a_value_error_that_says_what_can(option: str, value: object, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^{option}.*{hint}"):
        Fumi(**given(option, value))
    app = Fumi(name="mx.example")
    with pytest.raises(ValueError, match=f"^{option}"):
        app.configure(**given(option, value))


def test_a_default_is_a_value_that_its_check_keeps() -> None:
    for option in DECLARATIONS.values():
        if option.name != "name":
            assert option.check(option.name, option.default) == option.default


def test_an_option_has_the_flag_that_its_declaration_names() -> None:
    with main.make_context("fumi-core", [], resilient_parsing=True) as context:
        flags = {param.opts[-1]: param for param in main.get_params(context)}
    for option in DECLARATIONS.values():
        assert option.meaning.endswith("."), option.name
        if option.flag is not None:
            assert str(getattr(flags[option.flag], "help", "")).startswith(option.meaning), option.name


def test_overriding_options_keeps_the_others() -> None:
    app = Fumi(banner="own", size=1000)
    app.configure(size=None, disabled_commands=["vrfy"])
    assert (app.options.banner, app.options.size, app.options.disabled_commands) == ("own", None, ("VRFY",))


@pytest.mark.parametrize(
    ("option", "hint"), [("max_recipient", "'max_recipients'"), ("cert", "fumi_edge.Fumi"), ("disabled_verbs", "did you mean")]
)
def test_an_unknown_option_is_a_type_error_with_the_nearest(option: str, hint: str) -> None:
    for take in (Fumi, Fumi().configure):
        with pytest.raises(TypeError, match=hint):
            take(**given(option, "x"))


def test_the_commands_that_can_be_disabled_are_those_that_are_known() -> None:
    assert {verb.decode() for verb in Tally().commands} - {"OTHER"} == set(VERBS)


def test_use_xclient_accepts_the_command_from_a_trusted_proxy() -> None:
    for use, answer in ((False, "502 5.5.1"), (True, "220 mx.example")):
        assert replies(b"XCLIENT ADDR=192.0.2.7\r\n", use_xclient=use)[-1].startswith(answer)


def test_use_xforward_accepts_the_command_from_a_trusted_proxy() -> None:
    for use, answer in ((False, "502 5.5.1"), (True, "250 2.0.0")):
        assert replies(b"XFORWARD ADDR=192.0.2.7\r\n", use_xforward=use)[-1].startswith(answer)
