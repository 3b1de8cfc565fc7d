"""Handshakes that share a timer: each expires in its own time, and one that has ended does not."""

from __future__ import annotations

import asyncio

from fumi_edge.tls.handshake import Deadlines, Handshake


class Begun(Handshake):
    """A handshake without a socket, which writes its name down when it expires."""

    __slots__ = ("expired", "name")

    def __init__(self, name: str, expired: list[str]) -> None:
        self.name = name
        self.expired = expired

    def expire(self) -> None:
        self.expired.append(self.name)


def test_handshakes_expire_in_the_order_in_which_they_began_unless_they_have_ended() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        expired: list[str] = []
        deadlines = Deadlines(0.05)
        first, second, third = (Begun(name, expired) for name in ("first", "second", "third"))
        for handshake in (first, second):
            deadlines.begin(loop, handshake, loop.time())
        begun = loop.time()
        deadlines.end(first)
        while not expired:
            await asyncio.sleep(0.001)
        assert expired == ["second"]
        assert loop.time() - begun >= 0.04
        deadlines.end(second)
        deadlines.begin(loop, third, loop.time())  # the timer starts again
        while len(expired) < 2:
            await asyncio.sleep(0.001)
        assert expired == ["second", "third"]

    asyncio.run(main())
