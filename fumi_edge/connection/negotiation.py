"""Carries the STARTTLS preamble (starttls.py) between two plain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from fumi_edge.backends.replies import REPLY_LIMIT
from fumi_edge.connection.ends import End, Ended, NoBanner
from fumi_edge.connection.starttls import INJECTED, READY, Preamble, Step, Verdict
from fumi_edge.sockets.ending import SHUTTING_DOWN, TIMED_OUT
from fumi_edge.sockets.readiness import HangupWatch, readable, send_all
from fumi_edge.tls.records import arrived

READ_SIZE = 4096
CONTENT_READ_SIZE = 64 * 1024
"""The most bytes that are read at once while the client sends content."""
_NOTHING = Step()
_ENDS = {Verdict.INJECTION: End.INJECTION, Verdict.NOT_SMTP: End.NOT_SMTP, Verdict.ERRORS: End.ERRORS}


class Negotiation:
    """One connection's preamble on the wire. ``received`` and ``sent`` count the client's bytes."""

    def __init__(
        self, client: socket.socket, backend: socket.socket, preamble: Preamble, hangup_watch: HangupWatch, idle_timeout: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._backend = backend
        self._preamble = preamble
        self._idle_timeout = idle_timeout
        self._hangup_watch = hangup_watch
        self.received = self.sent = 0
        self.failure: OSError | None = None
        """The error of the backend's connection, once it has failed."""

    async def run(self) -> Step:
        """Relay until the client upgrades (UPGRADE, after the 220 was sent) or PLAINTEXT is decided.

        With PLAINTEXT the step holds the bytes that the tunnel sends first. Raises Ended when the connection ends, and NoBanner
        when the backend closed it before its banner.
        """
        step = _NOTHING
        while True:
            try:
                async with asyncio.timeout(self._idle_timeout):
                    step = await self._step()
                    if step.verdict is Verdict.PLAINTEXT:
                        return step
                    await self._reply(step.client)
                    await self._forward(step.backend)
                    if step.verdict is Verdict.UPGRADE:
                        await self._accept_starttls()
                        return step
            except TimeoutError:
                raise Ended(End.IDLE_TIMEOUT, TIMED_OUT) from None
            except asyncio.CancelledError:
                # The edge stops. A 421 may answer any command, but must not follow the 220 to STARTTLS.
                if step.verdict is None:
                    with contextlib.suppress(OSError):
                        self.sent += self._client.send(SHUTTING_DOWN)
                raise
            if step.verdict is not None:
                raise Ended(_ENDS[step.verdict])

    async def _step(self) -> Step:
        preamble = self._preamble
        if not preamble.wants_client:
            if preamble.held and (step := preamble.receive_from_backend(b"")) != _NOTHING:
                return step
            try:
                await self._hangup_watch.readable(self._client, self._backend)
            except ConnectionResetError:
                raise Ended(End.CLIENT_RESET) from None
            return self._from_backend()
        if preamble.in_content and preamble.held > REPLY_LIMIT:
            await readable(self._loop, self._client.fileno())
            return self._from_client()
        await readable(self._loop, self._client.fileno(), self._backend.fileno())
        # The backend is read first: a backend that has closed would not answer the client's command.
        step = self._from_backend()
        return self._from_client() if step is _NOTHING else step

    def _from_backend(self) -> Step:
        try:
            data = arrived(self._backend)
        except OSError as error:
            self.failure = error
            raise self._backend_ended(End.BACKEND_RESET) from None
        if data is None:
            return _NOTHING
        if not data:
            raise self._backend_ended(End.BACKEND_CLOSED)
        return self._preamble.receive_from_backend(data)

    def _backend_ended(self, reason: End) -> Exception:
        last = self._preamble.backend_ended()
        # The client is not read before it has got the banner, so another backend can still serve it.
        return Ended(reason, last) if last or self.sent else NoBanner(self.failure)

    def _from_client(self) -> Step:
        try:
            data = self._client.recv(CONTENT_READ_SIZE if self._preamble.in_content else READ_SIZE)
        except BlockingIOError:
            return _NOTHING
        except OSError:
            raise Ended(End.CLIENT_RESET) from None
        if not data:
            raise Ended(End.CLIENT_CLOSED)
        self.received += len(data)
        return self._preamble.receive_from_client(data)

    async def _reply(self, reply: bytes) -> None:
        try:
            await send_all(self._loop, self._client, reply)
        except TimeoutError:
            raise
        except OSError:
            raise Ended(End.CLIENT_RESET) from None
        self.sent += len(reply)

    async def _forward(self, command: bytes) -> None:
        try:
            await send_all(self._loop, self._backend, command)
        except TimeoutError:
            raise
        except OSError:
            # The backend has closed. Its last reply and its end will be read next.
            pass

    async def _accept_starttls(self) -> None:
        """Send the 220, or the 554 if bytes followed STARTTLS: they came in plaintext, and may have been injected."""
        try:
            early = self._client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            await self._reply(READY)
            return
        except OSError:
            raise Ended(End.CLIENT_RESET) from None
        if not early:
            raise Ended(End.CLIENT_CLOSED)
        await self._reply(INJECTED)
        raise Ended(End.INJECTION)
