"""A steady load: so many messages a second by STARTTLS, each sent again until it has its 250.

    python -m tests.support.load_client HOST PORT RATE CERTIFICATE PREFIX

writes a line of JSON to stdout for each attempt (verdict.Attempt). Ids of messages begin with PREFIX. At the end of stdin no new
message is begun; it ends when all have their 250.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from dataclasses import asdict

from tests.support.verdict import Attempt

ATTEMPT_SECONDS = 120.0
"""More than any attempt may take."""
RETRY_SECONDS = 1.0
PAUSE_SECONDS = 0.3
"""Before each command, and in the middle of the message: at any time there are sessions in every state."""
BODY = ("x" * 70 + "\r\n") * 30


class Refused(Exception):
    """A reply that ends the attempt."""


class Session:
    """One attempt to send one message."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._since = time.time()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    def _step(self, name: str) -> None:
        """The wait for the last step is over, and the next one begins."""
        now = time.time()
        self._attempt.longest = max(self._attempt.longest, now - self._since)
        self._since, self._attempt.step = now, name

    async def _pause(self, name: str) -> None:
        """The same, after a pause, which is none of the waits."""
        self._step(name)
        await asyncio.sleep(PAUSE_SECONDS)
        self._since = time.time()

    async def _say(self, name: str, line: bytes, code: bytes) -> None:
        await self._pause(name)
        assert self._writer is not None
        self._writer.write(line)
        while (reply := await self._reader.readline())[3:4] == b"-":
            pass
        if not reply:
            raise ConnectionResetError("closed")
        if not reply.startswith(code):
            raise Refused(reply.decode().strip())

    async def run(self, host: str, port: int, trust: ssl.SSLContext) -> None:
        attempt = self._attempt
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                await self._send(host, port, trust)
        except Refused as error:
            attempt.reply = str(error)
        except (OSError, ssl.SSLError) as error:
            attempt.error = f"{type(error).__name__}: {error}"
        finally:
            if self._writer is not None:
                self._writer.transport.abort()
        self._step(attempt.step)
        attempt.ended = time.time()

    async def _send(self, host: str, port: int, trust: ssl.SSLContext) -> None:
        self._reader, self._writer = await asyncio.open_connection(host, port)
        await self._say("banner", b"", b"220")
        await self._say("EHLO", b"EHLO client.example.net\r\n", b"250")
        await self._say("STARTTLS", b"STARTTLS\r\n", b"220")
        self._step("handshake")
        await self._writer.start_tls(trust, server_hostname="mx.example.org", ssl_handshake_timeout=ATTEMPT_SECONDS)
        await self._say("EHLO", b"EHLO client.example.net\r\n", b"250")
        await self._say("MAIL", b"MAIL FROM:<a@example.net>\r\n", b"250")
        await self._say("RCPT", b"RCPT TO:<b@example.org>\r\n", b"250")
        await self._say("DATA", b"DATA\r\n", b"354")
        await self._pause("text")
        self._writer.write(f"Subject: load\r\nX-Load: {self._attempt.id}\r\n\r\n{BODY}".encode())
        await self._say("message", f"{BODY}.\r\n".encode(), b"250")
        self._attempt.accepted = True
        await self._say("QUIT", b"QUIT\r\n", b"221")


async def deliver(id_: str, host: str, port: int, trust: ssl.SSLContext) -> None:
    """Send one message until it has its 250."""
    accepted = False
    while not accepted:
        attempt = Attempt(id=id_, began=time.time())
        await Session(attempt).run(host, port, trust)
        print(json.dumps(asdict(attempt)), flush=True)
        accepted = attempt.accepted
        if not accepted:
            await asyncio.sleep(RETRY_SECONDS)


async def main(host: str, port: int, rate: float, certificate: str, prefix: str) -> None:
    trust = ssl.create_default_context(cafile=certificate)
    loop = asyncio.get_running_loop()
    end = loop.run_in_executor(None, sys.stdin.read)
    messages: list[asyncio.Task[None]] = []
    while not end.done():
        messages.append(loop.create_task(deliver(f"{prefix}{len(messages)}", host, port, trust)))
        await asyncio.wait([end], timeout=1 / rate)
    await asyncio.gather(*messages)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5]))
