"""Lookups off the loop: what comes back, and what a resolver that hangs can do at most."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from fumi_core.runtime import resolver
from fumi_core.runtime.resolver import Resolver, ipv4_addresses
from tests.support.waiting import until


def test_an_error_of_the_resolver_is_the_callers() -> None:
    def fail(name: str) -> Sequence[str]:
        raise OSError(f"no way to {name}")

    with pytest.raises(OSError, match=r"no way to a\.example"):
        asyncio.run(Resolver(fail, timeout=30).lookup("a.example"))


def test_too_many_waiting_lookups_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "MAX_QUEUED_LOOKUPS", 3)
    taken, release = threading.Event(), threading.Event()

    def hang(name: str) -> Sequence[str]:
        taken.set()
        release.wait(60)
        return [name]

    async def overrun() -> list[object]:
        lookups = Resolver(hang, timeout=30, threads=1)
        first = asyncio.ensure_future(lookups.lookup("0"))
        await asyncio.to_thread(taken.wait, 60)
        waiting = [asyncio.ensure_future(lookups.lookup(str(number))) for number in range(1, 5)]
        await asyncio.sleep(0)
        release.set()
        return await asyncio.gather(first, *waiting, return_exceptions=True)

    *answers, last = asyncio.run(overrun())
    assert answers == [["0"], ["1"], ["2"], ["3"]]
    assert isinstance(last, OSError)


def test_its_threads_end_when_there_is_nothing_to_look_up() -> None:
    names: set[str] = set()

    def note(name: str) -> Sequence[str]:
        names.add(threading.current_thread().name)
        return ()

    async def ask() -> None:
        lookups = Resolver(note, timeout=30)
        await asyncio.gather(*(lookups.lookup(str(number)) for number in range(50)))

    asyncio.run(ask())
    assert names == {"resolver"}
    until(lambda: not any(thread.name == "resolver" for thread in threading.enumerate()))


def test_it_serves_one_loop_after_the_other() -> None:
    lookups = Resolver(lambda name: [name], timeout=30)
    assert [asyncio.run(lookups.lookup(name)) for name in "ab"] == [["a"], ["b"]]


@pytest.mark.parametrize("error", [socket.EAI_NONAME, socket.EAI_NODATA])
def test_a_name_that_is_not_there_has_no_addresses(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def getaddrinfo(host: str, *rest: Any) -> Any:
        assert host == "a.example."
        raise socket.gaierror(error, "")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert ipv4_addresses("a.example") == ()


def test_a_resolver_that_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*arguments: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(socket.gaierror):
        ipv4_addresses("a.example")


def test_a_hanging_lookup_does_not_keep_the_program_from_ending() -> None:
    program = """
import asyncio, time
from fumi_core.runtime.resolver import Resolver
async def main():
    try:
        await Resolver(lambda name: time.sleep(1000), timeout=0.05).lookup("a.example")
    except TimeoutError:
        print("too long")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("too long\n", "")


def test_without_a_thread_a_lookup_fails_with_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lookups = Resolver(lambda name: [name], timeout=30)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start new thread"):
            asyncio.run(lookups.lookup("a.example"))
    assert asyncio.run(lookups.lookup("a.example")) == ["a.example"]
