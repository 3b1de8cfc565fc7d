"""Runs a service of /etc/systemd/system as systemd would: on the sockets of its units, as its user, and again after a failure.

A program of its own, which imports nothing of the tests: `python unit_runner.py NAME.service`.
"""

from __future__ import annotations

import os
import pwd
import shlex
import socket
import sys
import time
from collections import defaultdict
from pathlib import Path

UNITS = Path("/etc/systemd/system")
FIRST = 3
"""The first descriptor that systemd passes."""


def settings(name: str) -> dict[str, list[str]]:
    """The unit's settings and those of its drop-ins; an empty one removes those before it."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in (UNITS / name, *sorted((UNITS / f"{name}.d").glob("*.conf"))):
        for line in path.read_text().splitlines():
            key, equals, value = line.partition("=")
            if not equals or line.startswith("#"):
                continue
            found[key] = [*found[key], value] if value else []
    return found


def listener(unit: dict[str, list[str]]) -> socket.socket:
    """What a socket unit listens on: a port of every interface, or a Unix socket."""
    (address,) = unit["ListenStream"]
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(address)
        os.chown(address, pwd.getpwnam(unit["SocketUser"][0]).pw_uid, -1)
        os.chmod(address, int(unit["SocketMode"][0], 8))
    else:
        sock = socket.create_server(("", int(address)), family=socket.AF_INET6, dualstack_ipv6=True)
    sock.listen(int(unit["Backlog"][0]))
    return sock


def become(service: dict[str, list[str]], sockets: dict[str, socket.socket]) -> None:
    """Replace this process by the program."""
    os.umask(int(service["UMask"][0], 8))
    numbers = [os.dup(sock.fileno()) for sock in sockets.values()]
    for number, descriptor in enumerate(numbers, FIRST):
        os.dup2(descriptor, number)
    os.closerange(FIRST + len(numbers), 256)
    user = pwd.getpwnam(service["User"][0])
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    passed = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(numbers)), "LISTEN_FDNAMES": ":".join(sockets)}
    words = shlex.split(service["ExecStart"][0])
    os.execve(words[0], words, {"PATH": os.environ["PATH"], **passed})


def main(name: str) -> None:
    """Serve until the program ends without failure."""
    service = settings(name)
    units = [settings(each) for each in service["Sockets"][0].split()]
    # Out of the way of those that the program gets.
    sockets = {unit["FileDescriptorName"][0]: listener(unit) for unit in units}
    while True:
        pid = os.fork()
        if not pid:
            become(service, sockets)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            return
        time.sleep(float(service["RestartSec"][0]))


if __name__ == "__main__":
    main(sys.argv[1])
