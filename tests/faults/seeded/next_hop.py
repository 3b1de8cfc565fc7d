"""A next hop that dies in any state, and knows what it took.

Dying is what kill -9 does to its sockets: all of them are closed at once, the one that listens too. It listens again when it is
revived. It runs in a thread of the test, so what it has stored outlives it, as a disk would.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import threading
from typing import NamedTuple

from tests.support.ports import kept_port

CONNECTING = ("connect", "accept", "banner", "half a banner", "EHLO", "half of EHLO's reply")
STATES = (
    *CONNECTING,
    *("MAIL", "RCPT", "DATA", "354", "text", "end", "end, stored", "half a reply, stored", "replies", "idle"),
)
"""Where it dies: before it sends the reply to that command, or where the words say. BDAT is DATA, too."""
_BDAT = re.compile(rb"BDAT (\d+)( LAST)?", re.IGNORECASE)


class Stored(NamedTuple):
    """A message for one recipient. ``answered`` tells that its 250 was sent."""

    recipient: str
    text: bytes
    answered: bool


class NextHop:
    """Speaks SMTP or LMTP on ``port``. It dies when it is condemned to, and is in that state."""

    def __init__(self, lmtp: bool) -> None:
        self.lmtp = lmtp
        self.stored: list[Stored] = []
        self.lock = threading.RLock()
        self.died = 0
        self.paused: list[str] = []
        """The recipients that had their 250 when it fell silent between LMTP's replies."""
        self._death, self._after, self._later = "", 0, ""
        self._selector = selectors.DefaultSelector()
        self._kept = kept_port()
        self.port: int = self._kept.getsockname()[1]
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._stopping = False
        self.revive()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    # The test's side

    def condemn(self, state: str, after: int = 0, defer: str = "") -> None:
        """Let it die in this state, or fall silent for once between two of LMTP's replies ("silence").

        Recipients that contain ``defer`` are answered 451 after the message.
        """
        with self.lock:
            self._death, self._after, self._later = state, after, defer
            self.paused = []
            if state in CONNECTING:
                self.hang_up()  # or no connection would come
            if state == "connect":
                self.die()

    def pardon(self) -> None:
        with self.lock:
            self._death = ""
            self.revive()

    def revive(self) -> None:
        """Listen again, and defer nobody any more."""
        with self.lock:
            self._later = ""
            if self._listener is None:
                self._listener = socket.create_server(("127.0.0.1", self.port))
                self._listener.setblocking(False)
                self._selector.register(self._listener, selectors.EVENT_READ)
                self._wake.send(b"x")

    def hang_up(self) -> None:
        """Close the connections, as one that has been idle for long enough does."""
        with self.lock:
            for connection in list(self._connections):
                self._end(connection)

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def busy(self) -> bool:
        """Whether somebody is in the middle of a transaction."""
        with self.lock:
            return any(connection.text is not None or connection.recipients for connection in self._connections)

    def take(self) -> list[Stored]:
        """What has been stored since the last call."""
        with self.lock:
            stored, self.stored = self.stored, []
            return stored

    def close(self) -> None:
        self._stopping = True
        self._wake.send(b"x")
        self._thread.join()
        self.die()
        for sock in (self._kept, self._wake, self._woken):
            sock.close()
        self._selector.close()

    # Its own

    def _serve(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                with self.lock:
                    self._ready(key)

    def _ready(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._woken:
            self._woken.recv(1000)
        elif key.fileobj is self._listener:
            with contextlib.suppress(BlockingIOError):
                sock = self._listener.accept()[0]
                connection = _Connection(self, sock)
                self._connections.add(connection)
                self._selector.register(sock, selectors.EVENT_READ, connection)
                with contextlib.suppress(Died):
                    connection.begin()
        elif key.data in self._connections:
            with contextlib.suppress(Died):
                if not key.data.readable():
                    self._end(key.data)

    def _end(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def die_in(self, state: str) -> bool:
        """Whether it is to die here and now."""
        if self._death != state:
            return False
        self._after -= 1
        return self._after < 0

    def die(self) -> None:
        with self.lock:
            self._death = ""
            self.died += 1
            if self._listener is not None:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None
            self.hang_up()

    def fall_silent(self, answered: list[str]) -> None:
        self._death, self.paused = "", answered

    def defers(self, recipient: str) -> bool:
        return bool(self._later) and self._later in recipient


class Died(Exception):
    """All sockets are closed."""


class _Connection:
    def __init__(self, hop: NextHop, sock: socket.socket) -> None:
        sock.setblocking(True)
        self.sock, self.hop = sock, hop
        self.buffer = b""
        self.recipients: list[str] = []
        self.text: bytes | None = None
        self.chunks = b""

    def _die(self, state: str, words: bytes = b"") -> None:
        """Die, if it is this state's turn, with these last words."""
        if self.hop.die_in(state):
            self._say(words)
            self.hop.die()
            raise Died

    def _say(self, words: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(words)

    def begin(self) -> None:
        self._die("accept")
        self._die("banner")
        self._die("half a banner", b"220 ho")
        self._say(b"220 hop\r\n")

    def readable(self) -> bool:
        """Read, and answer all that is whole. False at the end."""
        try:
            data = self.sock.recv(1 << 20)
        except OSError:
            return False
        self.buffer += data
        while self._step():
            pass
        return bool(data)

    def _step(self) -> bool:
        if self.text is not None:
            return self._more_text()
        line, found, rest = self.buffer.partition(b"\r\n")
        if not found:
            return False
        if chunk := _BDAT.fullmatch(line):
            size = int(chunk[1])
            if len(rest) < size:
                return False
            for state in ("DATA", "354", "text"):
                self._die(state)
            self.chunks, self.buffer = self.chunks + rest[:size], rest[size:]
            if chunk[2]:
                self._take(self.chunks)
            else:
                self._say(b"250 chunk\r\n")
            return True
        self.buffer = rest
        self._command(line.decode())
        return True

    def _command(self, line: str) -> None:
        verb = line[:4].upper()
        if verb in ("EHLO", "LHLO"):
            self._die("EHLO")
            self._die("half of EHLO's reply", b"250-hop\r\n250-PIPE")
            self._say(b"250-hop\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-CHUNKING\r\n250-BINARYMIME\r\n250 SIZE\r\n")
        elif verb == "RCPT":
            self._die("RCPT")
            self.recipients.append(line[line.index("<") + 1 : line.index(">")])
            self._say(b"250 recipient\r\n")
        elif verb == "DATA":
            self._die("DATA")
            self._say(b"354 go on\r\n")
            self._die("354")
            self.text = b""
        else:
            self._other(verb)

    def _other(self, verb: str) -> None:
        if verb in ("MAIL", "RSET"):
            self._die(verb)
            self.recipients, self.chunks = [], b""
        self._say(b"221 bye\r\n" if verb == "QUIT" else b"250 ok\r\n")

    def _more_text(self) -> bool:
        assert self.text is not None
        if self.buffer:
            self._die("text")
        self.text, self.buffer = self.text + self.buffer, b""
        end = 0 if self.text.startswith(b".\r\n") else self.text.find(b"\r\n.\r\n") + 2
        if end == 1:
            return False
        text, self.buffer, self.text = self.text[:end], self.text[end + 3 :], None
        self._take(b"\r\n".join([line.removeprefix(b".") for line in text.split(b"\r\n")]))
        return True

    def _take(self, text: bytes) -> None:
        """The message is whole: store it, and say so, or die on the way."""
        self._die("end")
        recipients, self.recipients, self.chunks = self.recipients, [], b""
        for state, words in (("end, stored", b""), ("half a reply, stored", b"250 2.0.0 st")):
            if self.hop.die_in(state):
                self._store(recipients, text, answered=False)
                self._say(words)
                self.hop.die()
                raise Died
        if not self.hop.lmtp:
            self._store(recipients, text, answered=True)
            self._say(b"250 stored\r\n")
        for number, recipient in enumerate(recipients if self.hop.lmtp else ()):
            if self.hop.die_in("replies"):
                self._store(recipients[number:], text, answered=False)
                self.hop.die()
                raise Died
            if number and self.hop.die_in("silence"):
                self.hop.fall_silent(recipients[:number])
                return
            if self.hop.defers(recipient):
                self._say(b"451 4.2.2 full\r\n")
            else:
                self._store([recipient], text, answered=True)
                self._say(b"250 stored\r\n")
        self._die("idle")

    def _store(self, recipients: list[str], text: bytes, answered: bool) -> None:
        self.hop.stored += [Stored(each, text, answered) for each in recipients]
