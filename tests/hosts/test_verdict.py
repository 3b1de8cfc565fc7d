"""The verdict on a load finds what it is there to find."""

from __future__ import annotations

from tests.support.verdict import Attempt, judge

ACCEPTED = Attempt("a", began=0, ended=2, step="QUIT", accepted=True, longest=1)
UNSURE = Attempt("b", began=0, ended=31, step="message", error="ConnectionResetError", longest=30)
REFUSED = Attempt("b", began=32, ended=33, step="message", reply="451 4.4.1 try again", longest=1)
AGAIN = Attempt("b", began=34, ended=39, step="QUIT", accepted=True, longest=2)


def test_a_message_that_is_stored_once_for_each_attempt_without_a_250_is_doubled_and_explained() -> None:
    verdict = judge([ACCEPTED, UNSURE, REFUSED, AGAIN], {"a": 1, "b": 3})
    assert (verdict.messages, verdict.lost, verdict.doubled, verdict.unexplained) == (2, 0, 1, 0)
    assert (verdict.refused, verdict.broken, verdict.longest, verdict.silence) == (1, 1, 30, 37)
    assert verdict.problems() == ["no message accepted for 37.0 s"]
    assert verdict.problems(answered=False) == []


def test_a_message_with_a_250_that_is_not_stored_is_lost_and_a_second_copy_of_another_is_unexplained() -> None:
    verdict = judge([ACCEPTED, AGAIN], {"b": 2})
    assert verdict.problems() == ["1 lost", "1 doubled after a 250", "no message accepted for 37.0 s"]


def test_a_client_that_waits_too_long_is_a_problem() -> None:
    slow = Attempt("c", began=0, ended=50, step="connect", error="TimeoutError", longest=36)
    assert judge([ACCEPTED, slow], {"a": 1}).problems() == ["a client waited 36.0 s"]
