"""Health checks of backends: connect, send a PROXY header of the edge's own, expect a 220, send QUIT, expect no error.

A name with several addresses is up when one of them is; those whose check fails are tried after the others for a while.

A server without the PROXY protocol also sends a banner, and takes the header for a command: only its error reply after
the banner shows this.

The results go to ``Backend`` (choice.py), which also knows of failed connections and decides whether it is up. Checks run in the
edge's loop, one at a time for each backend, with some jitter so that many edges do not check all at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Iterable

from fumi_core.runtime.logs import failure
from fumi_edge.backends.choice import Backend, Backends, own_opening
from fumi_edge.backends.dialing import CLOSE_SECONDS, LOCAL_ERRORS, Destination, Opening, error_text, quit_and_close, reason_of
from fumi_edge.backends.replies import STARTTLS_OFFER, Replies
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.backends.tls import TLSError, explained
from fumi_edge.metrics import BackendError
from fumi_edge.sockets.readiness import receive, send_all

log = logging.getLogger("fumi.edge.backends")

FALL = 2
"""Consecutive failed checks after which a backend is marked down: a single failure may be a delay of this process."""
RETRY_SECONDS = 1.0
"""Seconds until a failed check is repeated."""
DOWN_INTERVAL = 5.0
"""Seconds between checks of a backend that is down, unless the interval is shorter."""
JITTER = 0.1

ANSWER_SECONDS = 8.0
"""Seconds that readiness waits for a backend. Postfix's postscreen greets after 6, and the server of /readyz closes after 10."""

_HINT_HEADER_AWAITED = "; it may be waiting for a PROXY header"
_HINT_HEADER_UNKNOWN = "the PROXY header; if it does not know the PROXY protocol, use --proxy-protocol off"


class BadBanner(Exception):
    """The backend accepts connections but does not greet with 220, or greets and then rejects the PROXY header.

    The message holds the reply or the failure.
    """


async def health_check(destination: Destination, settings: BackendSettings) -> None:
    """Make one check. Raises BadBanner, or OSError when the connection fails."""
    loop = asyncio.get_running_loop()
    opening = own_opening(settings.proxy_protocol)
    while True:
        sock = await destination.connect(loop, settings.connect_timeout, opening)
        try:
            return await _check_connection(loop, sock, settings, opening)
        except (BadBanner, OSError):
            if not destination.avoid(sock):
                raise


async def _check_connection(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, settings: BackendSettings, opening: Opening
) -> None:
    """Check what the backend sends, and close the connection. Raises BadBanner or OSError."""
    try:
        async with asyncio.timeout(settings.health_timeout):
            banner, rest = await _banner(loop, sock)
        if not banner.startswith(b"220"):
            raise BadBanner(f"answered {_quoted(banner)} instead of 220")
    except OSError as error:
        sock.close()
        if isinstance(problem := explained(sock, error), TLSError):
            # In TLS 1.3 the backend rejects the edge's certificate after the handshake.
            raise problem from None
        if not isinstance(error, TimeoutError):
            raise BadBanner(error.strerror or str(error)) from None
        raise BadBanner(
            f"sent no banner within {settings.health_timeout:g} s" + ("" if opening else _HINT_HEADER_AWAITED)
        ) from None
    except BaseException:
        sock.close()
        raise
    answer = rest + await quit_and_close(sock, min(settings.health_timeout, CLOSE_SECONDS))
    if answer.startswith((b"4", b"5")):
        raise BadBanner(f"answered {_quoted(answer)} to {_HINT_HEADER_UNKNOWN if opening else 'QUIT'}")


async def _banner(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> tuple[bytes, bytes]:
    """Read one reply. Returns it and the bytes after it."""
    replies = Replies()
    while data := await receive(loop, sock, 4096):
        if (banner := replies.feed(data)) is not None:
            return banner, replies.rest
    raise BadBanner("closed the connection without a banner")


def _quoted(reply: bytes) -> str:
    """The first line of a reply, quoted for logs."""
    return repr(reply.partition(b"\n")[0][:80].decode("ascii", "replace").strip())


def dependency_problems(settings: BackendSettings) -> list[str | None]:
    """Check all backends concurrently, from another thread. Returns each one's problem, or None."""

    async def run_all() -> list[str | None]:
        return await asyncio.gather(*_probes(settings))

    return asyncio.run(run_all())


def pool_problems(pools: Iterable[BackendSettings]) -> list[str | None]:
    """Check all pools concurrently, from another thread. Returns for each why none of its backends works, or None.

    A backend that has not answered within ANSWER_SECONDS does not work.
    """

    async def check_pool(settings: BackendSettings) -> str | None:
        probes = _probes(settings, ANSWER_SECONDS)
        for earliest in asyncio.as_completed(probes):
            if await earliest is None:
                return None
        named = zip(settings.destinations, probes, strict=True)
        return "; ".join(f"backend {destination.name}: {probe.result()}" for destination, probe in named)

    async def run_all() -> list[str | None]:
        return await asyncio.gather(*(check_pool(each) for each in pools))

    return asyncio.run(run_all())


def _probes(settings: BackendSettings, seconds: float | None = None) -> list[asyncio.Task[str | None]]:
    """A check of each backend, begun; within so many seconds in all."""
    loop = asyncio.get_running_loop()
    copies = [each.copy_for_other_loop() for each in settings.destinations]
    return [loop.create_task(_dependency_problem(each, settings, seconds)) for each in copies]


def offering_starttls(settings: BackendSettings) -> list[bool]:
    """Whether each backend offers STARTTLS to the edge; False when that cannot be determined. To be called outside the loop."""

    async def run_all() -> list[bool]:
        return await asyncio.gather(*(_offers_starttls(each.copy_for_other_loop(), settings) for each in settings.destinations))

    return asyncio.run(run_all())


async def _offers_starttls(destination: Destination, settings: BackendSettings) -> bool:
    loop = asyncio.get_running_loop()
    try:
        sock = await destination.connect(loop, settings.connect_timeout, own_opening(settings.proxy_protocol))
        try:
            async with asyncio.timeout(settings.health_timeout):
                await _banner(loop, sock)
                await send_all(loop, sock, b"EHLO localhost\r\n")
                reply, _ = await _banner(loop, sock)
        except BaseException:
            sock.close()
            raise
        await quit_and_close(sock, min(settings.health_timeout, CLOSE_SECONDS))
    except (OSError, BadBanner):
        return False
    return STARTTLS_OFFER.search(reply) is not None


async def _dependency_problem(destination: Destination, settings: BackendSettings, seconds: float | None) -> str | None:
    try:
        async with asyncio.timeout(seconds) as limit:
            await health_check(destination, settings)
    except OSError as error:
        return f"no answer yet after {seconds:g} s" if limit.expired() else error_text(error)
    except BadBanner as error:
        return str(error)
    return None


class Checks:
    """Checks every backend each ``health_interval`` seconds, until ``close()``; one that is in several pools once."""

    def __init__(self, *pools: Backends) -> None:
        loop = asyncio.get_running_loop()
        watched = {backend: pool.settings for pool in pools for backend in pool.all}
        self._tasks = [loop.create_task(self._watch(backend, settings)) for backend, settings in watched.items()]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _watch(self, backend: Backend, settings: BackendSettings) -> None:
        failures = FALL - 1  # the first failed check counts at once
        while True:
            try:
                await health_check(backend.destination, settings)
            except BadBanner as error:
                failures += 1
                self._failed(backend, failures, BackendError.BANNER, str(error))
            except OSError as error:
                detail = error_text(error)
                if error.errno in LOCAL_ERRORS:
                    backend.undecided(detail)
                else:
                    failures += 1
                    self._failed(backend, failures, reason_of(error), detail)
            except Exception as error:
                # A programming error is not the backend's failure, and must not end the checks.
                failure(log, "health check failed", error, backend=backend.name)
            else:
                failures = 0
                backend.healthy()
            await asyncio.sleep(_pause(settings, failures) * random.uniform(1 - JITTER, 1 + JITTER))

    def _failed(self, backend: Backend, failures: int, reason: BackendError, detail: str) -> None:
        backend.check_failed(reason, detail)
        if failures >= FALL:
            backend.unhealthy(reason, detail)


def _pause(settings: BackendSettings, failures: int) -> float:
    """Seconds until the next check after so many failures in a row."""
    if not failures:
        return settings.health_interval
    return min(settings.health_interval, RETRY_SECONDS if failures < FALL else DOWN_INTERVAL)
