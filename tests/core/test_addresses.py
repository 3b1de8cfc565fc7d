"""Addresses to listen on, on machines with and without IPv6."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fumi_core.runtime.addresses import parse_address
from fumi_core.runtime.listening import ListenAddress, bind, check_listen

LOOPBACK = [
    (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
]


class NoIPv6(socket.socket):
    """As where net.ipv6.conf.all.disable_ipv6 is 1."""

    def bind(self, address: Any) -> None:
        if self.family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        super().bind(address)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every name resolves to."""
    found = list(LOOPBACK)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: found)
    return found


def families(text: str) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(sock).family for sock in bind(parse_address(text))]


def test_a_name_is_listened_on_at_each_of_its_addresses(found: list[Any]) -> None:
    assert families("localhost:0") == [socket.AF_INET6, socket.AF_INET]


def test_without_ipv6_a_name_is_listened_on_at_its_ipv4_addresses(found: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", NoIPv6)
    assert families("localhost:0") == [socket.AF_INET]
    assert check_listen([ListenAddress("--listen", parse_address("localhost:0"))]) == ([], [])


def test_an_address_that_this_machine_has_not_is_an_error_all_the_same(found: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found[0] = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0))
    with pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)):
        families("mail.example:0")
    monkeypatch.setattr(socket, "socket", NoIPv6)
    del found[1]
    with pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)):
        families("mail.example:0")


def test_empty_brackets_are_not_every_interface() -> None:
    with pytest.raises(ValueError, match="no address in its brackets: for every interface write :25"):
        parse_address("[]:25")


def test_a_unix_listener_whose_queue_is_full_is_in_use_and_does_not_hang_the_start(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/hung")
    with contextlib.ExitStack() as stack:
        hung = stack.enter_context(socket.socket(socket.AF_UNIX))
        hung.bind(address.path)
        hung.listen(0)
        for _ in range(2):  # the first fills the queue
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            full = client.connect_ex(address.path) == errno.EAGAIN
        assert full
        assert check_listen([ListenAddress("--listen", address)]) == ([], [address])
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            bind(address)
