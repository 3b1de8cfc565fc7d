"""asyncio's event loop, with readers and writers that the selector calls itself, where the kernel's answer arrives.

asyncio creates a handle for each event, queues it, and runs it in a context; and each ``add_reader`` makes a dozen checks. Both
programs live on readers and writers, several for each connection, and need none of that. Everything else is asyncio's.

Differences from asyncio: a reader or writer runs before queued callbacks, and in no context of its own.

It replaces ``asyncio.SelectorEventLoop``: 3.7 instead of 4.3 µs an event with its recv() and send(), 2.7 instead of 11.2 µs for
add_reader() and remove_reader(). In ``ops/bench`` the CPU, as a ratio to that of asyncio's loop, is 0.91 (0.77 … 1.20) in the row
core-connect, 0.98 (0.85 … 1.05) in core-kept, and in edge-handshake 1.01 (0.92 … 1.11) and, in another run, 0.88
(0.75 … 1.03): 7 and 11 rounds on a busy machine, Python 3.11.7. Delete it when core-connect and edge-handshake, with
``asyncio.SelectorEventLoop`` in workers.py, are within 3 %; what ``shutdown_default_executor`` does differently must stay.

It uses two private names of ``asyncio.BaseEventLoop``: ``_default_executor`` and ``_executor_shutdown_called``.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import selectors
from collections.abc import Callable, Mapping
from typing import Any, TypeVarTuple, Unpack

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_EVENTS = 1024
"""Events taken from the kernel by one call."""

_Arguments = TypeVarTuple("_Arguments")
Call = tuple[Callable[..., object], tuple[Any, ...]]


class Loop(asyncio.SelectorEventLoop):
    """An event loop for Linux."""

    def __init__(self) -> None:
        self._poll = _Selector(self._failed)
        super().__init__(self._poll)

    def add_reader(self, fd: Any, callback: Callable[[Unpack[_Arguments]], Any], *args: *_Arguments) -> None:
        """Call ``callback`` whenever there is data to read, or end of file. Replaces the descriptor's reader."""
        watch = self._poll.watch(fd)
        watch.reader = callback, args
        self._poll.update(watch)

    def remove_reader(self, fd: Any) -> bool:
        """Returns whether there was a reader."""
        watch = self._poll.watch(fd)
        if watch.reader is None:
            # asyncio's own reader, such as sock_connect's, which it also removes by this method.
            return super().remove_reader(fd)
        watch.reader = None
        self._poll.update(watch)
        return True

    def add_writer(self, fd: Any, callback: Callable[[Unpack[_Arguments]], Any], *args: *_Arguments) -> None:
        """Call ``callback`` whenever there is room to write, or the peer is gone. Replaces the descriptor's writer."""
        watch = self._poll.watch(fd)
        watch.writer = callback, args
        self._poll.update(watch)

    def remove_writer(self, fd: Any) -> bool:
        """Returns whether there was a writer."""
        watch = self._poll.watch(fd)
        if watch.writer is None:
            # asyncio's own writer, such as sock_connect's, which it also removes by this method.
            return super().remove_writer(fd)
        watch.writer = None
        self._poll.update(watch)
        return True

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Accept no more work for asyncio's threads. Unlike asyncio, do not wait for them: a hook may block one for ever."""
        executor = getattr(self, "_default_executor", None)
        self._executor_shutdown_called = True
        if executor is not None:
            executor.shutdown(wait=False)

    def _failed(self, call: Call | None, error: Exception) -> None:
        self.call_exception_handler({"message": f"Exception in {call and call[0]!r}", "exception": error})


class _Watch:
    """A descriptor, its reader and its writer, and the events that the kernel was asked for."""

    __slots__ = ("asked", "fd", "reader", "writer")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reader: Call | None = None
        self.writer: Call | None = None
        self.asked = 0


class _Selector(selectors.BaseSelector):
    """epoll, for watched descriptors, and for the few that asyncio registers itself."""

    def __init__(self, failed: Callable[[Call | None, Exception], None]) -> None:
        self._epoll = select.epoll()
        self._failed = failed
        self._keys: dict[Any, selectors.SelectorKey] = {}
        self.watched: dict[int, _Watch] = {}

    def watch(self, fd: Any) -> _Watch:
        """The watch of a descriptor, created on the first call."""
        return self.watched.get(fd) or self.watched.get(number := _number(fd)) or _Watch(number)

    def update(self, watch: _Watch) -> None:
        """Ask the kernel for the events that are wanted now. Raises OSError for a descriptor that cannot be polled."""
        wanted = (_IN if watch.reader else 0) | (_OUT if watch.writer else 0)
        if wanted == watch.asked:
            return
        if not watch.asked:
            self._epoll.register(watch.fd, wanted)
            self.watched[watch.fd] = watch
        elif wanted:
            self._epoll.modify(watch.fd, wanted)
        else:
            del self.watched[watch.fd]
            self._forget(watch.fd)
        watch.asked = wanted

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, and call readers and writers; returns the events of asyncio's own descriptors."""
        try:
            events = self._epoll.poll(-1 if timeout is None else max(timeout, 0), _EVENTS)
        except InterruptedError:
            return []
        watched, registered = [], []
        for fd, event in events:
            if (watch := self.watched.get(fd)) is not None:
                watched.append((watch, event))
            elif (key := self._keys.get(fd)) is not None:
                mask = (selectors.EVENT_READ if event & ~_OUT else 0) | (selectors.EVENT_WRITE if event & ~_IN else 0)
                registered.append((key, mask & key.events))
        # Skip a watch that an earlier callback has removed: its descriptor may be closed, and the number reused.
        for watch, event in watched:
            call = None
            try:
                if event & ~_OUT and (call := watch.reader) is not None:
                    call[0](*call[1])
                if event & ~_IN and (call := watch.writer) is not None:
                    call[0](*call[1])
            except Exception as error:
                self._failed(call, error)
        return registered

    # The methods that asyncio calls on a selector

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _number(fileobj)
        if fd in self._keys or fd in self.watched:
            raise KeyError(f"{fileobj!r} is registered already")
        self._epoll.register(fd, _mask(events))
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
        # The kernel has removed a closed descriptor already.
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

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
