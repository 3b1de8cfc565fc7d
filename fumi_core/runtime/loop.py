"""asyncio's event loop, with readers and writers that the selector calls itself, where the kernel's answer arrives.

asyncio creates a handle for each event, queues it, and runs it in a context; each ``add_reader`` makes a dozen checks, and each
wait of the selector a turn of the loop. Both programs use several readers and writers for each connection, and need none of
that: the selector calls them itself, and waits again, as long as no callback of asyncio's is queued and no timer is due.
Everything else is asyncio's.

Differences from asyncio: a reader or writer runs before queued callbacks, and in no context of its own.

It replaces ``asyncio.SelectorEventLoop``: 6.0 instead of 6.8 µs an event with its recv() and send(), 2.5 instead of 5.4 µs for
add_reader() and remove_reader(). The CPU of a kept message in the core, as a ratio to that with asyncio's loop, is 0.95 from ten
sessions, as in the row core-kept of ``ops/bench``, and 0.90 from one (minima of 8 alternating runs, Python 3.11.2). In the row
core-connect it was 0.91 (0.77 … 1.20), in edge-handshake 0.88 (0.75 … 1.03): 7 and 11 rounds, Python 3.11.7. Delete it when
core-kept, core-connect and edge-handshake, with ``asyncio.SelectorEventLoop`` in workers.py, are within 3 %; what
``shutdown_default_executor`` does differently must stay.

It uses three private names of ``asyncio.BaseEventLoop``: ``_default_executor``, ``_executor_shutdown_called`` and ``_ready``.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
from collections.abc import Callable, Mapping, Sized
from contextvars import Context
from time import monotonic
from typing import Any, TypeVarTuple, Unpack

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_EVENTS = 1024
"""Events taken from the kernel by one call."""

_ROUNDS = 64
"""Waits in one ``select()``. Between two calls asyncio discards cancelled timers, of which each round may leave some."""

_Arguments = TypeVarTuple("_Arguments")
Callback = Callable[..., object]


class Loop(asyncio.SelectorEventLoop):
    """An event loop for Linux."""

    def __init__(self) -> None:
        self._poll = _Selector(self._failed)
        super().__init__(self._poll)
        self._poll.queued = self._ready  # type: ignore[attr-defined]

    def call_at(
        self, when: float, callback: Callable[[Unpack[_Arguments]], object], *args: *_Arguments, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call ``callback`` at ``when``, in seconds of the loop's time. The selector returns in time for it."""
        if when < self._poll.due:
            self._poll.due = when
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        """Stop after this round of the selector, and what is queued after it."""
        self._poll.due = 0.0
        super().stop()

    def add_reader(self, fd: Any, callback: Callable[[Unpack[_Arguments]], Any], *args: *_Arguments) -> None:
        """Call ``callback`` whenever there is data to read, or end of file. Replaces the descriptor's reader."""
        watch = self._poll.watch(fd)
        watch.reader, watch.reader_args = callback, args
        self._poll.update(watch)

    def remove_reader(self, fd: Any) -> bool:
        """Returns whether there was a reader."""
        watch = self._poll.watch(fd)
        if watch.reader is None:
            # asyncio's own reader, such as sock_connect's, which it also removes by this method.
            return super().remove_reader(fd)
        watch.reader, watch.reader_args = None, ()
        self._poll.update(watch)
        return True

    def add_writer(self, fd: Any, callback: Callable[[Unpack[_Arguments]], Any], *args: *_Arguments) -> None:
        """Call ``callback`` whenever there is room to write, or the peer has disconnected. Replaces the descriptor's writer."""
        watch = self._poll.watch(fd)
        watch.writer, watch.writer_args = callback, args
        self._poll.update(watch)

    def remove_writer(self, fd: Any) -> bool:
        """Returns whether there was a writer."""
        watch = self._poll.watch(fd)
        if watch.writer is None:
            # asyncio's own writer, such as sock_connect's, which it also removes by this method.
            return super().remove_writer(fd)
        watch.writer, watch.writer_args = None, ()
        self._poll.update(watch)
        return True

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Accept no more work for asyncio's threads. Unlike asyncio, do not wait for them: a hook may block one for ever."""
        executor = getattr(self, "_default_executor", None)
        self._executor_shutdown_called = True
        if executor is not None:
            executor.shutdown(wait=False)

    def _failed(self, call: Callback | None, error: BaseException) -> None:
        self.call_exception_handler({"message": f"Exception in {call!r}", "exception": error})


class _Watch:
    """A descriptor, its reader and its writer, and the events that are registered with the kernel."""

    __slots__ = ("fd", "reader", "reader_args", "registered", "writer", "writer_args")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reader: Callback | None = None
        self.reader_args: tuple[Any, ...] = ()
        self.writer: Callback | None = None
        self.writer_args: tuple[Any, ...] = ()
        self.registered = 0


class _Selector(selectors.BaseSelector):
    """epoll, for watched descriptors, and for the few that asyncio registers itself."""

    def __init__(self, failed: Callable[[Callback | None, BaseException], None]) -> None:
        self._epoll = select.epoll()
        self._failed = failed
        self._keys: dict[Any, selectors.SelectorKey] = {}
        self.watched: dict[int, _Watch] = {}
        self._new: set[int] = set()
        """The descriptors that were registered since the kernel reported the events that are being handled."""
        self.queued: Sized = ()
        """asyncio's callbacks that are ready to run."""
        self.due = 0.0
        """When ``select()`` must return, in seconds of the monotonic clock: asyncio's next timer, or now if it is to stop."""

    def watch(self, fd: Any) -> _Watch:
        """The watch of a descriptor, created on the first call."""
        return self.watched.get(fd) or self.watched.get(number := _number(fd)) or _Watch(number)

    def update(self, watch: _Watch) -> None:
        """Ask the kernel for the events that are wanted now. Raises OSError for a descriptor that cannot be polled."""
        wanted = (_IN if watch.reader else 0) | (_OUT if watch.writer else 0)
        if wanted == watch.registered:
            return
        if not watch.registered:
            self._epoll.register(watch.fd, wanted)
            self._new.add(watch.fd)
            self.watched[watch.fd] = watch
        elif wanted:
            self._epoll.modify(watch.fd, wanted)
        else:
            del self.watched[watch.fd]
            self._forget(watch.fd)
        watch.registered = wanted

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, and call readers and writers, until asyncio has something to do. Returns the events of its own descriptors."""
        self.due = math.inf if timeout is None else monotonic() + timeout
        wait: float = -1 if timeout is None else max(timeout, 0)
        for _ in range(_ROUNDS):
            try:
                events = self._epoll.poll(wait, _EVENTS)
            except InterruptedError:
                return []
            registered = self._call(events)
            if registered or self.queued or not events:
                return registered
            if self.due < math.inf:
                wait = self.due - monotonic()
                if wait <= 0:
                    return []
        return []

    def _call(self, events: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        """Call readers and writers. Returns the events of asyncio's own descriptors."""
        self._new.clear()
        registered = []
        for fd, event in events:
            if fd in self._new:
                continue  # a callback has closed the descriptor, and the number was reused: the event is the old one's
            if (watch := self.watched.get(fd)) is None:
                if (key := self._keys.get(fd)) is not None:
                    mask = (selectors.EVENT_READ if event & ~_OUT else 0) | (selectors.EVENT_WRITE if event & ~_IN else 0)
                    registered.append((key, mask & key.events))
                continue
            call = None
            try:
                if event & ~_OUT and (call := watch.reader) is not None:
                    call(*watch.reader_args)
                if event & ~_IN and (call := watch.writer) is not None:
                    call(*watch.writer_args)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # CancelledError, too, as asyncio does
                self._failed(call, error)
        return registered

    # The methods that asyncio calls on a selector

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _number(fileobj)
        if fd in self._keys or fd in self.watched:
            raise KeyError(f"{fileobj!r} is registered already")
        self._epoll.register(fd, _mask(events))
        self._new.add(fd)
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(_number(fileobj))
        self._forget(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[_number(fileobj)]
        if events != key.events:
            self._epoll.modify(key.fd, _mask(events))
        key = self._keys[key.fd] = key._replace(events=events, data=data)
        return key

    def _forget(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError:
            return  # the kernel has removed a closed descriptor already

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys[_number(fileobj)]

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()
        self.watched.clear()


def _number(fd: Any) -> int:
    number: int = fd if isinstance(fd, int) else fd.fileno()
    return number


def _mask(events: int) -> int:
    return (_IN if events & selectors.EVENT_READ else 0) | (_OUT if events & selectors.EVENT_WRITE else 0)
