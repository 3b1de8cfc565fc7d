"""The server of the rows `all-in-one-…`: `fumi_edge.Fumi` with TLS from the first byte, which discards: `PORT CERT KEY`."""

from __future__ import annotations

import asyncio
import sys

from fumi_core import DataContext, Next
from fumi_edge import Fumi


async def discard(ctx: DataContext, next: Next) -> None:
    """Accept the message, and keep nothing of it."""
    async for _ in ctx.stream:
        pass


async def main(port: str, cert: str, key: str) -> None:
    """Serve until killed."""
    app = Fumi(secure=True, cert=cert, key=key, auth_optional=True)
    app.on_data(discard)
    await app.listen(int(port), "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
