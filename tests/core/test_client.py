"""The sans-IO parts of the client: replies out of bytes however cut, dots stuffed, parameters chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fumi_core.client.commands import mail_command
from fumi_core.client.replies import MAX_LINE_BYTES, MAX_REPLY_BYTES, Malformed, ReceivedReply, ReplyReader
from fumi_core.errors import SMTPError
from fumi_core.smtp.data import DotReader, DotWriter
from fumi_core.smtp.session import Address, Envelope


@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_replies_are_read_however_they_are_cut(step: int) -> None:
    data = b"220 hop\r\n250-a\r\n250-b c\r\n250 d\r\n250\r\n354 go\n550-5.1.1 x\r\n550 5.1.1 y\r\n"
    reader = ReplyReader()
    answers = [answer for at in range(0, len(data), step) for answer in reader.feed(data[at : at + step])]
    codes = [(220, ("hop",)), (250, ("a", "b c", "d")), (250, ("",)), (354, ("go",)), (550, ("5.1.1 x", "5.1.1 y"))]
    assert answers == [ReceivedReply(*each) for each in codes]
    assert answers[1].extensions == {"B": "c", "D": ""}
    assert answers[4].text == "5.1.1 x\ny"


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"25\r\n",
        b"2500 Ok\r\n",
        b"150 Ok\r\n",
        b"650 Ok\r\n",
        b"+OK\r\n",
        b"250-a\r\n251 b\r\n",
        b"250_a\r\n",
        b"\xff" * (MAX_LINE_BYTES + 1),
        b"250 " + b"x" * MAX_LINE_BYTES,
        b"250 " + b"x" * MAX_LINE_BYTES + b"\r\n",
        b"250-x\r\n" * (MAX_REPLY_BYTES // 7 + 1),
    ],
)
@pytest.mark.parametrize("step", [1, 5000])
def test_a_malformed_reply_is_an_error_at_once(data: bytes, step: int) -> None:
    def feed_all(reader: ReplyReader) -> None:
        for at in range(0, len(data), step):
            reader.feed(data[at : at + step])

    with pytest.raises(Malformed):
        feed_all(ReplyReader())


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7, 1000])
@pytest.mark.parametrize(
    "text", [b"", b".", b"..\r\n", b".\r\n.\r\n", b"a\r\n.\r\n..b\r\n.c", b"a.\r\n\r\n.\r\n", b"no end", b"\r\n"]
)
def test_stuffed_text_comes_out_of_a_reader_as_it_went_in(text: bytes, step: int) -> None:
    dots = DotWriter()
    sent = b"".join(dots.feed(text[at : at + step]) for at in range(0, len(text), step)) + dots.end()
    reader = DotReader("reject")
    assert reader.feed(sent + b"QUIT\r\n") == (text if text.endswith(b"\r\n") or not text else text + b"\r\n")
    assert reader.rest == b"QUIT\r\n"


def test_requiretls_mail_never_leaves_this_host() -> None:
    envelope = Envelope(require_tls=True)
    away: Any = SimpleNamespace(extensions={"REQUIRETLS": ""}, local=False)
    for protocol in ("smtp", "lmtp"):
        with pytest.raises(SMTPError, match=r"5\.7\.30"):
            mail_command(Address("a@b.example", {}), envelope, away, protocol)
