"""close_notify is sent without a read, for one connection after the other."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

import pytest

from fumi_edge.tls.close_notify import CloseNotify
from fumi_edge.tls.policy import Policy, TLSSocket
from tests.edge.held_watch import CALLS, HeldWatch
from tests.support.certificates import CertificateFiles


@pytest.fixture
def close_notify() -> Iterator[CloseNotify]:
    with contextlib.closing(CloseNotify()) as close_notify:
        close_notify.open()
        yield close_notify


class Session:
    """A client's TLS session; ``ours`` is the edge's side."""

    def __init__(self, certificate: CertificateFiles) -> None:
        ours, theirs = socket.socketpair()
        server, client = Policy().context(), ssl.create_default_context(cafile=certificate[0])
        server.load_cert_chain(*certificate)
        self.ours = server.wrap_socket(ours, server_side=True, do_handshake_on_connect=False)
        self.theirs = client.wrap_socket(
            theirs, server_hostname="localhost", do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        waiting = [self.theirs, self.ours]
        for sock in waiting:
            sock.setblocking(False)
        while waiting:
            with contextlib.suppress(ssl.SSLWantReadError):
                waiting[0].do_handshake()
                del waiting[0]
            waiting.reverse()

    def end(self, close_notify: CloseNotify) -> None:
        """End the edge's direction; the client must see that it is the end."""
        socket.socket.sendall(self.ours, close_notify.record(self.ours))
        assert self.theirs.recv(1) == b""

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def session(certificate: CertificateFiles) -> Iterator[Session]:
    with contextlib.closing(Session(certificate)) as session:
        yield session


@pytest.fixture
def other(certificate: CertificateFiles) -> Iterator[Session]:
    with contextlib.closing(Session(certificate)) as session:
        yield session


def test_the_client_gets_close_notify_and_the_edge_what_it_sends_afterwards(session: Session, close_notify: CloseNotify) -> None:
    session.theirs.send(b"before")
    session.end(close_notify)
    session.theirs.send(b" after")
    assert session.ours.recv(100) + session.ours.recv(100) == b"before after"


def test_a_connection_whose_tls_has_failed_has_none_and_the_next_one_has(
    session: Session, other: Session, close_notify: CloseNotify
) -> None:
    socket.socket.send(session.theirs, b"not a record of TLS")
    with pytest.raises(ssl.SSLError):
        session.ours.recv(1)
    assert close_notify.record(session.ours) == b""
    other.end(close_notify)


@pytest.mark.parametrize("call", CALLS)
def test_a_read_that_is_ended_too_late_takes_close_notify_from_nobody(
    session: Session, other: Session, close_notify: CloseNotify, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The watch of long reads is about to end one when it returns: it must not reach the socket pair of close_notify."""
    watch = HeldWatch(monkeypatch, call)
    watch.read(session.ours)
    at_the_end = TLSSocket.unwrap

    def unwrap(sock: TLSSocket) -> socket.socket:
        watch.finish()
        return at_the_end(sock)

    monkeypatch.setattr(TLSSocket, "unwrap", unwrap)
    record = close_notify.record(session.ours)
    monkeypatch.setattr(TLSSocket, "unwrap", at_the_end)
    assert record
    other.end(close_notify)
