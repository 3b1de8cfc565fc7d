"""The STARTTLS dialogue without any sockets, fed in every way that bytes can be cut."""

from __future__ import annotations

import pytest

from fumi_edge.backends.replies import Replies
from fumi_edge.connection.starttls import LINE_LIMIT, MUST_STARTTLS, Preamble, Step, Verdict

BANNER = b"220 hi\r\n"


def started(**options: bool) -> Preamble:
    preamble = Preamble(**options)
    assert preamble.receive_from_backend(BANNER) == Step(client=BANNER)
    assert preamble.wants_client
    return preamble


def test_a_command_is_forwarded_and_the_next_waits_for_the_reply() -> None:
    preamble = started()
    assert preamble.receive_from_client(b"NOOP\r\nRSET\r\nHELP") == Step(backend=b"NOOP\r\n")
    assert not preamble.wants_client
    assert preamble.receive_from_backend(b"250 o") == Step()
    assert preamble.receive_from_backend(b"k\r\n") == Step(b"250 ok\r\n", b"RSET\r\n")
    assert preamble.receive_from_backend(b"250 ok\r\n") == Step(b"250 ok\r\n")
    assert preamble.wants_client


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
def test_starttls_is_offered_once(reply: bytes, offered: bytes) -> None:
    for cut in range(len(reply)):
        preamble = started()
        assert preamble.receive_from_client(b"ehlo me\r\n") == Step(backend=b"ehlo me\r\n")
        first, second = preamble.receive_from_backend(reply[:cut]), preamble.receive_from_backend(reply[cut:])
        assert first.client + second.client == offered


def test_hidden_starttls_is_taken_out_of_the_backends_own_offer() -> None:
    preamble = started(hide_starttls=True)
    preamble.receive_from_client(b"EHLO me\r\n")
    assert preamble.receive_from_backend(b"250-hi\r\n250-SIZE\r\n250 STARTTLS\r\n").client == b"250-hi\r\n250 SIZE\r\n"


@pytest.mark.parametrize(
    ("reply", "rest"),
    [
        (b"250 STARTTLS\r\n", b"250 STARTTLS\r\n"),  # a name
        (b"250-hi\r\n250 STARTTLS\r\n", b"250 hi\r\n"),
        (b"250 hi\r\n", b"250 hi\r\n"),
        (b"250\r\n", b"250 \r\n"),
    ],
)
def test_a_list_that_holds_nothing_besides_starttls_can_be_hidden(reply: bytes, rest: bytes) -> None:
    preamble = started(hide_starttls=True)
    preamble.receive_from_client(b"EHLO me\r\n")
    assert preamble.receive_from_backend(reply).client == rest


def test_with_require_tls_a_command_that_would_get_530_is_not_offered_in_plaintext() -> None:
    preamble = started(require_tls=True)
    preamble.receive_from_client(b"EHLO me\r\n")
    offer = (
        b"250-AUTH\r\n250-PIPELINING\r\n250-auth PLAIN LOGIN\r\n250-AUTH=LOGIN\r\n250-CHUNKING\r\n250-BINARYMIME\r\n"
        b"250-ETRN\r\n250-XCLIENT NAME ADDR\r\n250-AUTHENTIC\r\n250 AUTH CRAM-MD5\r\n"
    )
    expected = b"250-AUTH\r\n250-PIPELINING\r\n250-AUTHENTIC\r\n250 STARTTLS\r\n"
    assert preamble.receive_from_backend(offer).client == expected


def test_without_require_tls_everything_is_offered_in_plaintext_too() -> None:
    preamble = started()
    preamble.receive_from_client(b"EHLO me\r\n")
    offer = b"250-hi\r\n250-AUTH PLAIN\r\n250-CHUNKING\r\n250 STARTTLS\r\n"
    assert preamble.receive_from_backend(offer).client == offer


def test_helo_is_offered_nothing() -> None:
    preamble = started()
    preamble.receive_from_client(b"HELO me\r\n")
    assert preamble.receive_from_backend(b"250 hi\r\n").client == b"250 hi\r\n"


def offered(**options: bool) -> Preamble:
    """A preamble in which STARTTLS was offered."""
    preamble = started(**options)
    preamble.receive_from_client(b"EHLO me\r\n")
    assert preamble.receive_from_backend(b"250 hi\r\n").client.endswith(b"250 STARTTLS\r\n")
    return preamble


@pytest.mark.parametrize(
    "line", [b"BDAT 5 FIRST\r\n", b"BDAT\r\n", b"BDAT x\r\n", b"BDAT  5\r\n", b"BDAT 5\n", b"BDAT 1234567890123456789\r\n"]
)
def test_a_chunk_of_unknown_length_ends_the_preamble_with_all_that_has_arrived(line: bytes) -> None:
    preamble = offered()
    step = preamble.receive_from_client(line + b"STARTTLS\r\nhalf a li")
    assert step == Step(backend=line + b"STARTTLS\r\nhalf a li", verdict=Verdict.PLAINTEXT)


@pytest.mark.parametrize("hide", [False, True])
def test_where_starttls_was_not_offered_content_ends_the_preamble(hide: bool) -> None:
    preamble = started(hide_starttls=hide)
    assert preamble.receive_from_client(b"BDAT 5\r\nhel") == Step(backend=b"BDAT 5\r\nhel", verdict=Verdict.PLAINTEXT)
    preamble = started(hide_starttls=hide)
    preamble.receive_from_client(b"DATA\r\n")
    assert preamble.receive_from_backend(b"354 go\r\n") == Step(b"354 go\r\n", verdict=Verdict.PLAINTEXT)


CONTENTS = {
    b"DATA\r\n": (b"354 go\r\n", b"STARTTLS\r\n..\r\n\n.\n\r.\r\r\n.x\r\n\0\r\n.\r\n"),
    b"data\r\n": (b"354 go\r\n", b".\r\n"),
    b"BDAT 21\r\n": (b"", b"STARTTLS\r\n.\r\nEHLO x\r\n"),
    b"bdat 3 last\r\n": (b"", b"\r\n."),
    b"BDAT 0 LAST\r\n": (b"", b""),
    b"AUTH LOGIN\r\n": (b"334 VXNlcm5hbWU6\r\n", b"STARTTLS\r\n"),
}


@pytest.mark.parametrize("command", CONTENTS)
def test_starttls_is_answered_after_content_however_that_is_cut(command: bytes) -> None:
    asked, content = CONTENTS[command]
    for cut in range(len(content) + 1):
        preamble = offered()
        step = preamble.receive_from_client(command + (b"" if asked else content[:cut]))
        forwarded = step.backend
        if asked:
            assert preamble.receive_from_backend(asked).client == asked
            forwarded += preamble.receive_from_client(content[:cut]).backend
        assert preamble.in_content == (cut < len(content))
        forwarded += preamble.receive_from_client(content[cut:]).backend if cut < len(content) else b""
        assert forwarded == command + content
        assert not preamble.wants_client
        assert preamble.receive_from_backend(b"250 ok\r\n") == Step(b"250 ok\r\n")
        assert preamble.receive_from_client(b"STARTTLS\r\n") == Step(verdict=Verdict.UPGRADE)


@pytest.mark.parametrize("command", [b"DATA\r\n", b"BDAT 21\r\n"])
def test_commands_pipelined_after_content_wait_for_its_reply(command: bytes) -> None:
    asked, content = CONTENTS[command]
    preamble = offered()
    step = preamble.receive_from_client(command + content + b"STARTTLS\r\n")
    assert step == Step(backend=command + (b"" if asked else content))
    if asked:
        assert preamble.receive_from_backend(asked) == Step(asked, content)
    assert preamble.receive_from_backend(b"250 ok\r\n") == Step(b"250 ok\r\n", verdict=Verdict.UPGRADE)


def test_a_reply_that_comes_before_the_end_of_the_content_is_the_reply_to_it() -> None:
    """Servers that refuse a chunk do not always wait for all of it."""
    preamble = offered()
    assert preamble.receive_from_client(b"BDAT 5\r\nab") == Step(backend=b"BDAT 5\r\nab")
    assert preamble.receive_from_backend(b"503 no\r\n") == Step()
    assert preamble.held
    assert preamble.receive_from_client(b"cdeNOOP\r\n") == Step(backend=b"cde")
    assert preamble.receive_from_backend(b"") == Step(b"503 no\r\n", b"NOOP\r\n")


def test_auth_goes_on_until_the_backend_sends_no_more_challenges() -> None:
    preamble = offered()
    preamble.receive_from_client(b"AUTH LOGIN\r\n")
    for _ in range(2):
        assert preamble.receive_from_backend(b"334 more\r\n") == Step(b"334 more\r\n")
        assert preamble.receive_from_client(b"x" * 12000) == Step(backend=b"x" * 12000)
        assert preamble.receive_from_client(b"\r\n") == Step(backend=b"\r\n")
    assert preamble.receive_from_backend(b"535 no\r\n") == Step(b"535 no\r\n")
    assert preamble.receive_from_client(b"STARTTLS\r\n") == Step(verdict=Verdict.UPGRADE)


@pytest.mark.parametrize("command", [b"MAIL FROM:<>", b"mail from:<>", b"RCPT TO:<a@b>", b"AUTH PLAIN", b"DATA"])
def test_a_client_whose_command_was_refused_can_still_upgrade(command: bytes) -> None:
    preamble = started()
    assert preamble.receive_from_client(command + b"\r\n") == Step(backend=command + b"\r\n")
    assert preamble.receive_from_backend(b"530 first\r\n") == Step(b"530 first\r\n")
    assert preamble.receive_from_client(b"STARTTLS\r\n") == Step(verdict=Verdict.UPGRADE)


def test_an_unexpected_3yz_reply_ends_the_preamble() -> None:
    preamble = started()
    preamble.receive_from_client(b"XYZZY\r\nwhatever")
    assert preamble.receive_from_backend(b"354 go on\r\n") == Step(b"354 go on\r\n", b"whatever", Verdict.PLAINTEXT)


@pytest.mark.parametrize("line", [b"STARTTLS\r\n", b"starttls\r\n", b"StartTLS \r\n"])
def test_starttls_cut_anywhere_is_an_upgrade(line: bytes) -> None:
    for cut in range(len(line)):
        preamble = started()
        assert preamble.receive_from_client(line[:cut]) == Step()
        assert preamble.receive_from_client(line[cut:]) == Step(verdict=Verdict.UPGRADE)


def test_starttls_that_waited_for_a_reply_is_an_upgrade_too() -> None:
    preamble = started()
    preamble.receive_from_client(b"EHLO me\r\nSTARTTLS\r\n")
    assert preamble.receive_from_backend(b"250 hi\r\n") == Step(b"250-hi\r\n250 STARTTLS\r\n", verdict=Verdict.UPGRADE)


def test_anything_after_starttls_is_an_injection() -> None:
    for behind in (b"E", b"\r\n", b"RSET\r\n", b"\x16\x03\x01"):
        assert started().receive_from_client(b"STARTTLS\r\n" + behind).verdict is Verdict.INJECTION
        preamble = started()
        preamble.receive_from_client(b"EHLO me\r\nSTARTTLS\r\n" + behind)
        assert preamble.receive_from_backend(b"250 hi\r\n").verdict is Verdict.INJECTION


def test_a_bare_newline_does_not_start_tls() -> None:
    assert started().receive_from_client(b"STARTTLS\n") == Step(backend=b"STARTTLS\n")


def test_a_line_too_long_takes_no_memory() -> None:
    preamble = started()
    for _ in range(100):
        assert preamble.receive_from_client(b"x" * 4096) == Step()
        assert len(preamble._commands) <= LINE_LIMIT
    assert preamble.receive_from_client(b"\nNOOP\r\n") == Step(b"500 5.5.2 Error: line too long\r\n", b"NOOP\r\n")


def test_the_longest_line_is_forwarded_and_one_byte_more_is_not() -> None:
    line = b"NOOP " + b"x" * (LINE_LIMIT - 7) + b"\r\n"
    assert started().receive_from_client(line).backend == line
    assert started().receive_from_client(line[:-2] + b"y\r\n") == Step(b"500 5.5.2 Error: line too long\r\n")


def test_with_require_tls_even_a_long_mail_line_is_refused() -> None:
    preamble = started(require_tls=True)
    assert preamble.receive_from_client(b"MAIL FROM:<a@b> " + b"x" * 5000) == Step()
    assert preamble.receive_from_client(b"\r\nMAIL FROM:<a@b>\r\n") == Step(b"500 5.5.2 Error: line too long\r\n" + MUST_STARTTLS)
    assert preamble.refused


def test_unsolicited_replies_of_the_backend_are_relayed() -> None:
    preamble = started()
    assert preamble.receive_from_backend(b"421 bye") == Step(b"421 bye")
    preamble.receive_from_client(b"NOOP\r\n")
    assert preamble.receive_from_backend(b"250 half") == Step()
    assert preamble.backend_ended() == b"250 half"


def test_replies_are_found_however_they_are_cut() -> None:
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
