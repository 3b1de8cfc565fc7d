"""The addresses of a backend's name: which are tried, in which order, when the name is resolved again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

import fumi_edge.backends.choice
import fumi_edge.backends.dialing
import fumi_edge.backends.health
from fumi_edge.backends.choice import AVOID_SECONDS, Backend, Backends
from fumi_edge.backends.dialing import Opening, Remote, ResolvedAddress
from fumi_edge.metrics import BackendError, EdgeMetrics
from tests.edge.backends import MakePool
from tests.support.ports import free_port

Loop = asyncio.AbstractEventLoop


def test_a_backend_that_failed_is_tried_again_after_a_while_by_one_client_at_a_time(pool: MakePool) -> None:
    backends = pool("127.0.0.1:1", "127.0.0.1:2", balance="first")
    first, second = backends.all
    first.failed(100.0, BackendError.REFUSED, "no")
    assert list(backends.candidates(100.0 + AVOID_SECONDS * 0.9)) == [second, first]
    assert list(backends.candidates(100.0 + AVOID_SECONDS)) == [first, second]
    first.trying(100.0 + AVOID_SECONDS)
    assert list(backends.candidates(100.0 + AVOID_SECONDS)) == [second, first]
    first.connected(0.1)
    assert list(backends.candidates(100.0 + AVOID_SECONDS)) == [first, second]


def test_a_backend_that_checks_found_down_is_not_up_again_after_a_time(pool: MakePool) -> None:
    backends = pool("127.0.0.1:1", "127.0.0.1:2", balance="first")
    first, second = backends.all
    first.unhealthy(BackendError.BANNER, "554")
    first.connected(0.1)
    assert list(backends.candidates(1e9)) == [second, first]
    first.healthy()
    assert list(backends.candidates(1e9)) == [first, second]


def test_without_checks_what_earlier_ones_have_found_does_not_count(pool: MakePool) -> None:
    before = pool("127.0.0.1:1")
    before.all[0].unhealthy(BackendError.BANNER, "554")
    settings = replace(before.settings, health_interval=0)
    metrics = EdgeMetrics(CollectorRegistry(), [], "0")
    (after,) = Backends(settings, metrics, before.all).all
    assert (after.up, after.metrics.up.value) == (True, 1)


class Resolver:
    """Answers in the system's place from now on; ``answer`` is a list of addresses, or an error, or empty for silence."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answer: str | Exception) -> None:
        self.answer = list(answer)
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self._resolve)

    def _resolve(self, host: str, port: int, *, type: int) -> list[tuple[socket.AddressFamily, int, int, str, tuple[str, int]]]:
        self.asked += 1
        if not self.answer:
            threading.Event().wait()
        addresses = []
        for each in self.answer:
            if isinstance(each, Exception):
                raise each
            addresses.append((socket.AF_INET, type, 6, "", (each, port)))
        return addresses


def dialed_hosts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The IP addresses that are connected to from now on, in this order."""
    dialed = []
    dial = fumi_edge.backends.dialing._connect

    def noted(
        loop: asyncio.AbstractEventLoop, address: ResolvedAddress, timeout: float, opening: Opening
    ) -> Awaitable[socket.socket]:
        dialed.append(address[1][0])
        return dial(loop, address, timeout, opening)

    monkeypatch.setattr(fumi_edge.backends.dialing, "_connect", noted)
    return dialed


async def come_and_go(backends: Backends, preferred: Backend | None = None) -> Backend:
    """A client's connection to a backend, closed at once. Returns the backend."""
    sock, backend = await backends.connect(b"", preferred)
    sock.close()
    return backend


def test_addresses_are_kept_when_the_resolver_fails_later(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        resolver = Resolver(monkeypatch, "127.0.0.1")
        backends = pool(f"mail.test:{listening}")
        monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE_INTERVAL", 0.0)
        for number in range(1, 4):
            while resolver.asked < number:  # a connection starts no lookup while another one is running
                backend = await come_and_go(backends)
                await asyncio.sleep(0.01)
            resolver.answer = [socket.gaierror("no more")]
        assert backend.up
        while "keeping the old addresses" not in caplog.text:
            await asyncio.sleep(0)

    asyncio.run(scenario())


def test_addresses_are_kept_when_the_settings_change(pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int) -> None:
    async def scenario() -> None:
        resolver = Resolver(monkeypatch, "127.0.0.1")
        name, metrics = f"mail.test:{listening}", EdgeMetrics(CollectorRegistry(), [], "0")
        before = pool(name)
        await come_and_go(before)
        resolver.answer = [socket.gaierror("no more")]
        await come_and_go(Backends(pool(name).settings, metrics, before.all))

    asyncio.run(scenario())


def test_a_resolver_that_hangs_is_given_up_after_the_connect_timeout(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        resolver = Resolver(monkeypatch)
        backends = pool("mail.test:25", timeout=0.1)
        results = await asyncio.gather(*(backends.connect(b"") for _ in range(20)), return_exceptions=True)
        assert {type(each) for each in results} == {fumi_edge.backends.choice.NoBackend}
        assert resolver.asked == 1  # each question takes a thread
        assert not backends.all[0].up

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_fault_of_ours_is_not_the_last_check(
    monkeypatch: pytest.MonkeyPatch, pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        outcomes = [RuntimeError("can't start new thread"), None]

        async def health_check(*_: object) -> None:
            if (outcome := outcomes.pop(0) if outcomes else None) is not None:
                raise outcome

        monkeypatch.setattr(fumi_edge.backends.health, "health_check", health_check)
        backends = pool("127.0.0.1:1")
        checks = fumi_edge.backends.health.Checks(backends)
        while backends.local_problem() is not None:
            await asyncio.sleep(0.01)
        await checks.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert "health check failed" in caplog.text


def test_of_several_addresses_the_one_that_answered_comes_first_from_then_on(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    async def scenario() -> None:
        Resolver(monkeypatch, "127.0.0.3", "127.0.0.1")
        backends = pool(f"mail.test:{listening}")
        remote = backends.all[0].destination
        assert isinstance(remote, Remote)
        while not remote._failed:  # the other may be the first by chance
            await come_and_go(backends)
        targets = await remote.addresses(asyncio.get_running_loop(), 1.0)
        assert [name[0] for _, name in targets] == ["127.0.0.1", "127.0.0.3"]

    asyncio.run(scenario())


def test_an_address_that_does_not_answer_costs_one_client_its_time_and_not_one_at_each_question(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    """It stays after those that work, in whatever order the resolver returns them."""

    async def scenario() -> None:
        resolver = Resolver(monkeypatch, "127.0.0.3", "127.0.0.1")
        dialed = dialed_hosts(monkeypatch)
        monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE_INTERVAL", 0.0)
        backends = pool(f"mail.test:{listening}")
        while "127.0.0.3" not in dialed:  # the other may be the first by chance
            await come_and_go(backends)
        resolver.asked = 0
        while resolver.asked < 5:
            await come_and_go(backends)
            await asyncio.sleep(0.01)
        assert dialed.count("127.0.0.3") == 1
        # When there is nothing else, it gets its chance.
        resolver.answer = ["127.0.0.3"]
        while dialed[-1] != "127.0.0.3":
            with contextlib.suppress(fumi_edge.backends.choice.NoBackend):
                await come_and_go(backends)
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 30))


Everywhere = tuple[int, Callable[[], str]]


@pytest.fixture
def listening_everywhere() -> Iterator[Everywhere]:
    """A port of all of this machine's addresses, and which of them were connected to."""
    with socket.create_server(("", 0), backlog=64) as server:

        def connected() -> str:
            with server.accept()[0] as sock:
                return str(sock.getsockname()[0])

        yield server.getsockname()[1], connected


def test_the_second_connections_of_clients_that_upgrade_go_to_all_addresses_of_a_name(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening_everywhere: Everywhere
) -> None:
    """The first ends at the upgrade, so the second is the one that lasts."""
    port, connected = listening_everywhere

    async def scenario() -> set[str]:
        Resolver(monkeypatch, "127.0.0.1", "127.0.0.2")
        backends, second = pool(f"mail.test:{port}"), set()
        for _ in range(40):  # all the same by chance: once in 2^39
            await come_and_go(backends)
            connected()
            await come_and_go(backends, backends.all[0])
            second.add(connected())
        return second

    assert asyncio.run(scenario()) == {"127.0.0.1", "127.0.0.2"}


def test_addresses_that_remain_share_what_an_address_that_failed_would_have_got(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> Counter[str]:
        Resolver(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.3")
        remote, loop = pool("mail.test:25").all[0].destination, asyncio.get_running_loop()
        assert isinstance(remote, Remote)
        dead = (socket.AF_INET, ("127.0.0.1", 25))
        await remote.addresses(loop, 1.0)
        remote._failed[dead] = loop.time()
        orders = [await remote.addresses(loop, 1.0) for _ in range(900)]
        assert {order[-1] for order in orders} == {dead}
        return Counter(name[0] for (_, name), *_ in orders)

    first = asyncio.run(scenario())
    assert sorted(first) == ["127.0.0.2", "127.0.0.3"]
    assert min(first.values()) > 350  # by chance alone: once in 10^10


def test_an_address_without_a_banner_is_avoided_and_the_check_goes_on_with_the_next(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of which one address works is up: otherwise one core that hangs would make every edge unready."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer.get_extra_info("sockname")[0] == "127.0.0.1":
            writer.write(b"220 hi\r\n")
            await reader.readline()
        writer.close()

    async def scenario() -> None:
        Resolver(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.3")
        async with await asyncio.start_server(greet, ["127.0.0.1", "127.0.0.2", "127.0.0.3"], free_port()) as server:
            backends = pool(f"mail.test:{server.sockets[0].getsockname()[1]}")
            remote, loop = backends.all[0].destination, asyncio.get_running_loop()
            assert isinstance(remote, Remote)
            for _ in range(20):
                await fumi_edge.backends.health.health_check(remote, backends.settings)
            assert len(remote._failed) == 2
            assert {(await remote.addresses(loop, 1.0))[0][1][0] for _ in range(20)} == {"127.0.0.1"}
            Resolver(monkeypatch, "127.0.0.2", "127.0.0.3")
            remote._start_lookup(loop)
            await remote._lookup_error(1.0)
            with pytest.raises(fumi_edge.backends.health.BadBanner):
                await fumi_edge.backends.health.health_check(remote, backends.settings)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_addresses_come_and_go_with_the_answers_of_the_resolver(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening_everywhere: Everywhere
) -> None:
    port, connected = listening_everywhere
    monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE_INTERVAL", 0.0)

    async def scenario() -> None:
        resolver = Resolver(monkeypatch, "127.0.0.1", "127.0.0.2")
        backends = pool(f"mail.test:{port}")
        for answer in (["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.3", "127.0.0.4"], ["127.0.0.4"]):
            resolver.answer = list(answer)
            last: list[str] = []
            while set(last[-30:]) != set(answer):  # the last thirty, so that none goes to a removed address
                await come_and_go(backends)
                last.append(connected())
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_address_that_failed_is_used_again_after_a_while(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening_everywhere: Everywhere
) -> None:
    port, connected = listening_everywhere
    monkeypatch.setattr(fumi_edge.backends.dialing, "AVOID_ADDRESS_SECONDS", 0.05)

    async def scenario() -> None:
        Resolver(monkeypatch, "127.0.0.1", "127.0.0.2")
        backends = pool(f"mail.test:{port}")
        dial = fumi_edge.backends.dialing._connect

        async def broken(
            loop: asyncio.AbstractEventLoop, target: ResolvedAddress, timeout: float, opening: Opening
        ) -> socket.socket:
            if target[1][0] == "127.0.0.2":
                raise ConnectionRefusedError(errno.ECONNREFUSED, "no")
            return await dial(loop, target, timeout, opening)

        with monkeypatch.context() as patch:
            patch.setattr(fumi_edge.backends.dialing, "_connect", broken)
            for _ in range(4):
                await come_and_go(backends)
                assert connected() == "127.0.0.1"
        seen = set()
        while "127.0.0.2" not in seen:
            await come_and_go(backends)
            seen.add(connected())
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_when_no_address_of_a_name_can_be_connected_to_it_is_resolved_at_once(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    """The client that finds out is served where the name has moved to."""

    async def scenario() -> None:
        resolver = Resolver(monkeypatch, "127.0.0.3", "127.0.0.4")
        backends = pool(f"mail.test:{listening}")
        monkeypatch.setattr(fumi_edge.backends.dialing, "MIN_RESOLVE_INTERVAL", 3600.0)
        for _ in range(5):
            with pytest.raises(fumi_edge.backends.choice.NoBackend):
                await backends.connect(b"")
        assert resolver.asked == 1  # so long ago is a second
        resolver.answer = ["127.0.0.1"]
        monkeypatch.setattr(fumi_edge.backends.dialing, "MIN_RESOLVE_INTERVAL", 0.0)
        results = await asyncio.gather(*(backends.connect(b"") for _ in range(10)))
        assert resolver.asked == 2
        assert backends.all[0].up
        for sock, _ in results:
            sock.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_while_all_addresses_are_known_to_have_failed_the_name_is_resolved_before_they_are_tried(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    """Each may take the whole connect timeout, and the name may have moved meanwhile."""

    async def scenario() -> None:
        resolver = Resolver(monkeypatch, "127.0.0.3", "127.0.0.4")
        monkeypatch.setattr(fumi_edge.backends.dialing, "MIN_RESOLVE_INTERVAL", 0.0)
        backends = pool(f"mail.test:{listening}")
        with pytest.raises(fumi_edge.backends.choice.NoBackend):
            await backends.connect(b"")
        dialed = dialed_hosts(monkeypatch)
        resolver.answer = ["127.0.0.4", "127.0.0.1"]
        await come_and_go(backends)
        assert dialed == ["127.0.0.1"]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_client_does_not_wait_for_all_addresses_of_a_name_when_trying_them_takes_long(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    """There may be a thousand, and each may take the whole connect timeout; the next backend may serve at once."""

    async def scenario() -> None:
        Resolver(monkeypatch, *(f"127.0.0.{number}" for number in range(3, 250)))
        monkeypatch.setattr(fumi_edge.backends.dialing, "MAX_TIMEOUTS", 0)
        backends = pool(f"mail.test:{listening}", f"127.0.0.1:{listening}", balance="first")
        dialed = dialed_hosts(monkeypatch)
        assert await come_and_go(backends) is backends.all[1]
        assert dialed[1:] == ["127.0.0.1"]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_name_that_cannot_be_resolved_any_more_is_one_line_in_the_log(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        resolver = Resolver(monkeypatch, "127.0.0.3")
        monkeypatch.setattr(fumi_edge.backends.dialing, "MIN_RESOLVE_INTERVAL", 0.0)
        backends = pool("mail.test:9")
        for _ in range(5):
            with pytest.raises(fumi_edge.backends.choice.NoBackend):
                await backends.connect(b"")
            resolver.answer = [socket.gaierror("no more")]
        assert resolver.asked >= 5

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert caplog.text.count("keeping the old addresses") == 1


def test_a_backend_that_no_address_of_ours_can_reach_is_down_and_reported(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``[::1]`` without IPv6, or no port left: neither must look like a backend that is merely not busy."""

    async def nowhere(*_: object) -> None:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    async def scenario() -> None:
        monkeypatch.setattr(fumi_edge.backends.dialing, "_connect", nowhere)
        backends = pool("[::1]:2525", "[::1]:2526")
        with pytest.raises(fumi_edge.backends.choice.NoBackend, match="Cannot assign requested address"):
            await backends.connect(b"")
        assert [backend.up for backend in backends.all] == [False, False]

    asyncio.run(scenario())
    assert caplog.text.count("reason=unreachable") == 2


def test_a_backend_that_cannot_be_connected_to_in_time_is_reported(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def nowhere(*_: object) -> None:
        raise TimeoutError

    async def scenario() -> None:
        monkeypatch.setattr(fumi_edge.backends.dialing, "_connect", nowhere)
        with pytest.raises(fumi_edge.backends.choice.NoBackend, match="timed out"):
            await pool("127.0.0.1:2525").connect(b"")

    asyncio.run(scenario())
    assert 'reason=timeout error="timed out"' in caplog.text


def test_a_check_that_could_not_be_made_says_why(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def scenario() -> None:
        monkeypatch.setattr(fumi_edge.backends.health, "health_check", exhausted)
        backends = pool("127.0.0.1:2525")
        checks = fumi_edge.backends.health.Checks(backends)
        while backends.local_problem() != "backend 127.0.0.1:2525: Too many open files":
            await asyncio.sleep(0.01)
        await checks.close()
        assert backends.all[0].up
        assert backends.all[0].metrics.errors[BackendError.OTHER].value

    asyncio.run(asyncio.wait_for(scenario(), 30))
