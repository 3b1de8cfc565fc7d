"""The STARTTLS dialogue without any sockets, fed in every way that bytes can be cut."""

from __future__ import annotations

import pytest

from fumi_edge.starttls import LINE_LIMIT, MUST_STARTTLS, Preamble, Replies, Step, Verdict

BANNER = b"220 hi\r\n"


def started(**options) -> Preamble:
    preamble = Preamble(**options)
    assert preamble.backend_said(BANNER) == Step(client=BANNER)
    assert preamble.wants_command
    return preamble


def test_a_command_is_forwarded_and_the_next_waits_for_the_reply():
    preamble = started()
    assert preamble.client_said(b"NOOP\r\nRSET\r\nHELP") == Step(backend=b"NOOP\r\n")
    assert not preamble.wants_command
    assert preamble.backend_said(b"250 o") == Step()
    assert preamble.backend_said(b"k\r\n") == Step(b"250 ok\r\n", b"RSET\r\n")
    assert preamble.backend_said(b"250 ok\r\n") == Step(b"250 ok\r\n")
    assert preamble.wants_command


@pytest.mark.parametrize(
    ("reply", "offered"),
    [
        (b"250 hi\r\n", b"250-hi\r\n250 STARTTLS\r\n"),
        (b"250-hi\r\n250 SIZE\r\n", b"250-hi\r\n250-SIZE\r\n250 STARTTLS\r\n"),
        (b"250-hi\r\n250 STARTTLS\r\n", b"250-hi\r\n250 STARTTLS\r\n"),
        (b"250-hi\r\n250-starttls \r\n250 X\r\n", b"250-hi\r\n250-starttls \r\n250 X\r\n"),
        (b"250 STARTTLS\r\n", b"250-STARTTLS\r\n250 STARTTLS\r\n"),
        (b"250-STARTTLSX\r\n250 X\r\n", b"250-STARTTLSX\r\n250-X\r\n250 STARTTLS\r\n"),
        (b"502 no\r\n", b"502 no\r\n"),
        (b"250-hi\n250 X\n", b"250-hi\n250-X\n250 STARTTLS\r\n"),
        (b"250\r\n", b"250-\r\n250 STARTTLS\r\n"),
        (b"250-a\rb\r\n250 X\r\n", b"250-a\rb\r\n250-X\r\n250 STARTTLS\r\n"),
    ],
)
def test_starttls_is_offered_once(reply, offered):
    for cut in range(len(reply)):
        preamble = started()
        assert preamble.client_said(b"ehlo me\r\n") == Step(backend=b"ehlo me\r\n")
        first, second = preamble.backend_said(reply[:cut]), preamble.backend_said(reply[cut:])
        assert first.client + second.client == offered


def test_hidden_starttls_is_taken_out_of_the_backends_own_offer():
    preamble = started(hide_starttls=True)
    preamble.client_said(b"EHLO me\r\n")
    assert preamble.backend_said(b"250-hi\r\n250-SIZE\r\n250 STARTTLS\r\n").client == b"250-hi\r\n250 SIZE\r\n"


@pytest.mark.parametrize(
    ("reply", "rest"),
    [
        (b"250 STARTTLS\r\n", b"250 STARTTLS\r\n"),  # a name
        (b"250-hi\r\n250 STARTTLS\r\n", b"250 hi\r\n"),
        (b"250 hi\r\n", b"250 hi\r\n"),
        (b"250\r\n", b"250 \r\n"),
    ],
)
def test_a_list_that_holds_nothing_besides_starttls_can_be_hidden(reply, rest):
    preamble = started(hide_starttls=True)
    preamble.client_said(b"EHLO me\r\n")
    assert preamble.backend_said(reply).client == rest


def test_with_require_tls_a_command_that_would_get_530_is_not_offered_in_plaintext():
    preamble = started(require_tls=True)
    preamble.client_said(b"EHLO me\r\n")
    offer = (
        b"250-AUTH\r\n250-PIPELINING\r\n250-auth PLAIN LOGIN\r\n250-AUTH=LOGIN\r\n250-CHUNKING\r\n250-BINARYMIME\r\n"
        b"250-ETRN\r\n250-XCLIENT NAME ADDR\r\n250-AUTHENTIC\r\n250 AUTH CRAM-MD5\r\n"
    )
    expected = b"250-AUTH\r\n250-PIPELINING\r\n250-AUTHENTIC\r\n250 STARTTLS\r\n"
    assert preamble.backend_said(offer).client == expected


def test_without_require_tls_everything_is_offered_in_plaintext_too():
    preamble = started()
    preamble.client_said(b"EHLO me\r\n")
    offer = b"250-hi\r\n250-AUTH PLAIN\r\n250-CHUNKING\r\n250 STARTTLS\r\n"
    assert preamble.backend_said(offer).client == offer


def test_helo_is_offered_nothing():
    preamble = started()
    preamble.client_said(b"HELO me\r\n")
    assert preamble.backend_said(b"250 hi\r\n").client == b"250 hi\r\n"


@pytest.mark.parametrize("command", [b"BDAT 5", b"bdat 5 LAST"])
def test_commands_with_content_end_the_preamble_with_all_that_is_there(command):
    preamble = started()
    step = preamble.client_said(command + b"\r\nSTARTTLS\r\nhalf a li")
    assert step == Step(backend=command + b"\r\nSTARTTLS\r\nhalf a li", verdict=Verdict.PLAINTEXT)


@pytest.mark.parametrize("command", [b"MAIL FROM:<>", b"mail from:<>", b"RCPT TO:<a@b>", b"AUTH PLAIN", b"DATA"])
def test_a_client_whose_command_was_refused_can_still_upgrade(command):
    preamble = started()
    assert preamble.client_said(command + b"\r\n") == Step(backend=command + b"\r\n")
    assert preamble.backend_said(b"530 first\r\n") == Step(b"530 first\r\n")
    assert preamble.client_said(b"STARTTLS\r\n") == Step(verdict=Verdict.UPGRADE)


def test_a_reply_that_asks_for_more_ends_the_preamble():
    preamble = started()
    preamble.client_said(b"XYZZY\r\nwhatever")
    assert preamble.backend_said(b"354 go on\r\n") == Step(b"354 go on\r\n", b"whatever", Verdict.PLAINTEXT)


@pytest.mark.parametrize("line", [b"STARTTLS\r\n", b"starttls\r\n", b"StartTLS \r\n"])
def test_starttls_cut_anywhere_is_an_upgrade(line):
    for cut in range(len(line)):
        preamble = started()
        assert preamble.client_said(line[:cut]) == Step()
        assert preamble.client_said(line[cut:]) == Step(verdict=Verdict.UPGRADE)


def test_starttls_that_waited_for_a_reply_is_an_upgrade_too():
    preamble = started()
    preamble.client_said(b"EHLO me\r\nSTARTTLS\r\n")
    assert preamble.backend_said(b"250 hi\r\n") == Step(b"250-hi\r\n250 STARTTLS\r\n", verdict=Verdict.UPGRADE)


def test_anything_behind_starttls_is_an_injection():
    for behind in (b"E", b"\r\n", b"RSET\r\n", b"\x16\x03\x01"):
        assert started().client_said(b"STARTTLS\r\n" + behind).verdict is Verdict.INJECTION
        preamble = started()
        preamble.client_said(b"EHLO me\r\nSTARTTLS\r\n" + behind)
        assert preamble.backend_said(b"250 hi\r\n").verdict is Verdict.INJECTION


def test_a_bare_newline_does_not_start_tls():
    assert started().client_said(b"STARTTLS\n") == Step(backend=b"STARTTLS\n")


def test_a_line_too_long_leaves_nothing_behind_in_memory():
    preamble = started()
    for _ in range(100):
        assert preamble.client_said(b"x" * 4096) == Step()
        assert len(preamble._commands) <= LINE_LIMIT
    assert preamble.client_said(b"\nNOOP\r\n") == Step(b"500 5.5.2 Error: line too long\r\n", b"NOOP\r\n")


def test_the_longest_line_is_forwarded_and_one_byte_more_is_not():
    line = b"NOOP " + b"x" * (LINE_LIMIT - 7) + b"\r\n"
    assert started().client_said(line).backend == line
    assert started().client_said(line[:-2] + b"y\r\n") == Step(b"500 5.5.2 Error: line too long\r\n")


def test_with_require_tls_even_a_long_mail_line_is_refused():
    preamble = started(require_tls=True)
    assert preamble.client_said(b"MAIL FROM:<a@b> " + b"x" * 5000) == Step()
    assert preamble.client_said(b"\r\nMAIL FROM:<a@b>\r\n") == Step(b"500 5.5.2 Error: line too long\r\n" + MUST_STARTTLS)
    assert preamble.refused


def test_what_comes_unasked_from_the_backend_is_relayed():
    preamble = started()
    assert preamble.backend_said(b"421 bye") == Step(b"421 bye")
    preamble.client_said(b"NOOP\r\n")
    assert preamble.backend_said(b"250 half") == Step()
    assert preamble.backend_ended() == b"250 half"


def test_replies_are_found_however_they_are_cut():
    stream = b"220-one\r\n220 two\r\n250 x\r\nnonsense\r\n220-\r\n220\r\n"
    wanted = [b"220-one\r\n220 two\r\n", b"250 x\r\n", b"nonsense\r\n", b"220-\r\n220\r\n"]
    for size in range(1, len(stream)):
        replies, found = Replies(), []
        for at in range(0, len(stream), size):
            reply = replies.feed(stream[at : at + size])
            while reply is not None:
                found.append(reply)
                reply = replies.feed(b"")
        assert found == wanted
