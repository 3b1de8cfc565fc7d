"""One server to which mail is sent: its idle connections, what it offers, and the beginning of each transaction."""

from __future__ import annotations

import asyncio
import contextlib

from fumi_core.client.commands import CARRIED, mail_command, not_carried
from fumi_core.client.connection import (
    CONNECT_TIMEOUT,
    MAIL_TIMEOUT,
    RSET_TIMEOUT,
    Dialect,
    Failure,
    NextHopConnection,
    connect,
    timed_out,
)
from fumi_core.client.pool import Pool
from fumi_core.client.replies import ReceivedReply
from fumi_core.errors import SMTPError
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.smtp.session import Address, Session

EHLO_VALID_SECONDS = 300.0
"""Seconds for which a client may rely on an EHLO reply that offered more than the server offers now."""
MIN_CONNECT_SECONDS = 2.0
"""Minimum seconds for a new connection after an idle one has failed: enough for two SYNs (RFC 6298 §2.1)."""
EXTENSIONS_TIMEOUT = 5.0
"""Seconds that the server has, at the start, to report its extensions."""


class Hop:
    """The server at ``address``. ``not_offered`` are the extensions of ``CARRIED`` that the newest connection lacked."""

    def __init__(self, protocol: Dialect, address: SocketAddress) -> None:
        self.not_offered = CARRIED
        self._protocol = protocol
        self._address = address
        self._pool: Pool[NextHopConnection] = Pool()
        self._reduced: float | None = None  # when the server was found to offer fewer extensions than before

    async def learn_extensions(self, name: str) -> None:
        """Open a first connection, to learn the server's extensions. Until one succeeds, the server counts as having none."""
        with contextlib.suppress(Failure, TimeoutError):
            async with asyncio.timeout(EXTENSIONS_TIMEOUT):
                self._pool.put(await self._connect(name, CONNECT_TIMEOUT))

    async def mail(self, session: Session, sender: Address) -> tuple[NextHopConnection, ReceivedReply]:
        """Send MAIL. Raises Failure, and SMTPError if the server cannot carry the message."""
        try:
            async with asyncio.timeout(MAIL_TIMEOUT):
                return await self._mail(session, sender)
        except TimeoutError:
            raise timed_out("no reply to MAIL in time") from None

    async def _mail(self, session: Session, sender: Address) -> tuple[NextHopConnection, ReceivedReply]:
        """Use an idle connection that still works, or else a new one.

        If the server's host has vanished, the idle connection fails after 30 seconds (``runtime/dead_peers.py``). The client
        should not wait as long again for the new one.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        while (connection := self._pool.take()) is not None:
            with contextlib.suppress(Failure):
                if not connection.resetting or (await connection.receive_reply(RSET_TIMEOUT)).positive:
                    reply = await self._send_mail(connection, session, sender)
                    if reply.code != 421:
                        return connection, reply
            connection.abort()
        left = CONNECT_TIMEOUT - (loop.time() - started)
        connection = await self._connect(session.name, max(left, MIN_CONNECT_SECONDS))
        return connection, await self._send_mail(connection, session, sender)

    async def _send_mail(self, connection: NextHopConnection, session: Session, sender: Address) -> ReceivedReply:
        try:
            line = mail_command(sender, session.envelope, connection, self._protocol)
        except SMTPError as error:
            self._pool.put(connection)
            if self._reduced is not None and asyncio.get_running_loop().time() - self._reduced < EHLO_VALID_SECONDS:
                # A new EHLO would get another reply, after which the client might convert the message.
                raise SMTPError(f"4{error.message[1:]}", 451) from None
            raise
        return await connection.send_command(line, MAIL_TIMEOUT)

    async def _connect(self, name: str, timeout: float) -> NextHopConnection:
        connection = await connect(self._address, self._protocol, name, timeout)
        before, self.not_offered = self.not_offered, not_carried(connection)
        if self.not_offered - before:
            self._reduced = asyncio.get_running_loop().time()
        return connection

    def give_back(self, connection: NextHopConnection, clean: bool) -> None:
        """Keep the connection for the next transaction; ``clean`` tells that the server has ended the last one."""
        if not clean:
            connection.reset()
        self._pool.put(connection)

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()
