"""What clients notice when a program or a host dies, or the network fails.

Whatever happens, no message that got its 250 is lost, none is stored twice unless the client got no 250 for it, messages are
accepted again within 35 seconds, and no client waits longer than that for a reply or the end of its connection. Each fault is a
row of the table that is printed at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.hosts.mail_hosts import MailHosts, mail_hosts
from tests.support.load import Load
from tests.support.verdict import LIMIT, Verdict
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root makes network namespaces")
FIRST, FEW = 20, 8
"""Messages before a fault."""
BACK_SECONDS = 3.0
"""Until somebody starts a program again."""
OUTAGE_SECONDS = 15.0
ARP_SECONDS = 20.0
"""Until ARP fails for a host that has vanished: between the last two retransmissions before the user timeout, which is worst."""
IDLE_LIMIT = 120.0
"""Seconds until an idle session of a dead host has ended."""
Fault = Callable[[MailHosts, Load], None]


@pytest.fixture(scope="module")
def mail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MailHosts]:
    with mail_hosts(tmp_path_factory.mktemp("hosts")) as mail:
        yield mail


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows = [Verdict.HEAD]
    yield rows
    print("", *rows, sep="\n")


def ended(how: Callable[[MailHosts, str], None], name: str) -> Fault:
    """Its program ends, and somebody starts it again."""

    def fault(mail: MailHosts, load: Load) -> None:
        how(mail, name)
        load.run_for(BACK_SECONDS)
        mail.restart(name)
        load.await_accepted(FIRST)

    return fault


def cut_off(name: str) -> Fault:
    """Without network for 15 seconds."""

    def fault(mail: MailHosts, load: Load) -> None:
        mail.hosts[name].pull()
        load.run_for(OUTAGE_SECONDS)
        mail.hosts[name].plug()
        load.await_accepted(FIRST)

    return fault


def vanished(name: str) -> Fault:
    """Without network until every client that had to notice it has noticed it."""

    def fault(mail: MailHosts, load: Load) -> None:
        mail.hosts[name].pull()
        load.run_for(ARP_SECONDS)
        for host in mail.hosts.values():
            host.forget_neighbors()
        load.run_for(2 * LIMIT - ARP_SECONDS)
        mail.hosts[name].plug()
        load.await_accepted(FIRST)

    return fault


def slow(name: str) -> Fault:
    """With a cable that takes 200 ms each way and loses 2 % of the packets."""

    def fault(mail: MailHosts, load: Load) -> None:
        with mail.hosts[name].slow(0.2, 0.02, mail.directory / f"slow-{name}.log"):
            load.await_accepted(10 * FIRST)

    return fault


def reloaded(mail: MailHosts, load: Load) -> None:
    mail.reload("balancer")
    load.await_accepted(FIRST)


def restarted(mail: MailHosts, load: Load) -> None:
    mail.terminate("balancer")
    mail.restart("balancer")
    load.await_accepted(FIRST)


PROGRAMS = ("balancer", "edge1", "core1", "store")
FAULTS: dict[str, Fault] = {
    **{f"kill -9 of {name}": ended(MailHosts.kill, name) for name in PROGRAMS},
    **{f"SIGTERM of {name}": ended(MailHosts.terminate, name) for name in PROGRAMS},
    **{f"{name} cut off for 15 s": cut_off(name) for name in ("client", *PROGRAMS)},
    **{f"{name} vanishes": vanished(name) for name in ("edge1", "core1", "store")},
    **{f"{name}: 200 ms, 2 % loss": slow(name) for name in ("client", "edge1", "core1", "store")},
    "balancer reloaded": reloaded,
    "balancer restarted": restarted,
}


def test_a_core_that_dies_and_an_edge_that_stops_lose_no_mail(mail: MailHosts) -> None:
    load = mail.load()
    load.await_accepted(FEW)
    mail.kill("core1")
    load.await_accepted(FEW)
    mail.restart("core1")
    mail.terminate("edge1")
    load.await_accepted(FEW)
    mail.restart("edge1")
    verdict = load.finish(mail.texts)
    assert verdict.problems() == [], verdict.row("a core dies, an edge stops")


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_loses_mail_or_makes_a_client_wait(name: str, mail: MailHosts, table: list[str]) -> None:
    assert_harmless(name, mail, table)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["client", "edge", "core"])
def test_an_idle_session_ends_everywhere_when_one_of_its_hosts_vanishes(kind: str, mail: MailHosts) -> None:
    ended = mail.idle_sessions_ended()
    output = mail.start_idle_client()
    until(lambda: "250 " in output.read_text(), "the reply to EHLO")
    hosts = [host for name, host in mail.hosts.items() if name.startswith(kind)]
    for host in hosts:
        host.pull()
    began = time.monotonic()
    if kind != "client":
        until(lambda: "ended" in output.read_text(), "the end of the client's connection", IDLE_LIMIT)
    if kind != "core":
        until(lambda: mail.idle_sessions_ended() > ended, "the end of the core's session", IDLE_LIMIT)
    print(f"{kind} vanishes, idle session: ended after {time.monotonic() - began:.1f} s")
    for host in hosts:
        host.plug()
    load = mail.load()
    load.await_accepted(FEW)
    assert load.finish(mail.texts).problems() == []


def assert_harmless(name: str, mail: MailHosts, table: list[str]) -> None:
    load = mail.load()
    load.await_accepted(FIRST)
    FAULTS[name](mail, load)
    verdict = load.finish(mail.texts)
    table.append(verdict.row(name))
    # While the only store is away, all that clients can get is an answer.
    assert verdict.problems(answered=name != "store vanishes") == [], verdict.row(name)
