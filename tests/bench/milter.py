"""The mail filter of the row `core-milter`: wants every step, and says continue to each at once: `PORT`."""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import cast

_SILENT = b"DAQK"
_CONTINUE = b"\0\0\0\1c"
_AGREED = struct.pack("!IcIII", 13, b"O", 6, 0, 0)


class Filter(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._said = b""

    def data_received(self, data: bytes) -> None:
        """Answer each packet that is whole."""
        self._said += data
        while len(self._said) >= 5 and len(self._said) >= (end := 4 + int.from_bytes(self._said[:4], "big")):
            letter, self._said = self._said[4:5], self._said[end:]
            if letter not in _SILENT:
                self._transport.write(_AGREED if letter == b"O" else _CONTINUE)


async def main(port: str) -> None:
    """Serve until killed."""
    await asyncio.get_running_loop().create_server(Filter, "127.0.0.1", int(port))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
