"""A Dovecot with users, for logins, for recipients and for IMAP, and the servers that it queries about tokens and policy."""

from __future__ import annotations

import contextlib
import http.server
import imaplib
import json
import os
import pwd
import shutil
import signal
import socket
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import environment
from tests.interop.mail_servers import command
from tests.support.ports import free_port
from tests.support.programs import Programs, listening
from tests.support.waiting import until

CONFIGURATION = """
protocols = imap
base_dir = {directory}/base
state_dir = {directory}/state
log_path = {directory}/log
default_internal_user = nobody
default_internal_group = nogroup
default_login_user = daemon
ssl = no
disable_plaintext_auth = no
first_valid_uid = 1
mail_location = maildir:{directory}/mail/%d/%n/Maildir
auth_mechanisms = {mechanisms}
auth_debug = yes
auth_failure_delay = {failure_delay} secs
auth_policy_server_url = {policy}
auth_policy_hash_nonce = nonce
auth_policy_server_timeout_msecs = 5000
service imap-login {{
  inet_listener imap {{
    address = 127.0.0.1
    port = {port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service auth {{
  unix_listener {directory}/auth {{
    mode = 0666
  }}
  unix_listener {directory}/userdb {{
    mode = 0600
  }}
}}
passdb {{
  driver = oauth2
  mechanisms = xoauth2
  args = {directory}/oauth2
}}
passdb {{
  driver = passwd-file
  mechanisms = plain login
  args = username_format=%u {directory}/users
}}
userdb {{
  driver = passwd-file
  args = username_format=%u {directory}/users
}}
"""
OAUTH2 = """
tokeninfo_url = {tokens}
username_attribute = email
debug = yes
"""


class Answers:
    """An HTTP server. ``answer`` makes the status and the JSON object for a path and its body."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], tuple[int, dict[str, Any]]]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                status, value = answer(urllib.parse.unquote(self.path), json.loads(self.rfile.read(length) or b"{}"))
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def token_answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Token "of-NAME" is that user's; "broken" is one with which the server fails."""
    token = path.rpartition("=")[2]
    if token == "broken":
        return 500, {}
    if token.startswith("of-"):
        return 200, {"email": token.removeprefix("of-"), "expires_in": 3600}
    return 401, {"error": "invalid_token"}


def policy_answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """User "banned…" is rejected, and "tarpit…" has to wait for a second."""
    name = str(body.get("login", ""))
    status = -1 if name.startswith("banned") else 1 if name.startswith("tarpit") else 0
    return 200, {"status": status, "msg": "policy"}


class DovecotLogins:
    """Users joe, ann, banned, tarpit, moved (``nologin``) and elsewhere (``proxy``) at d.example, with the password "secret"."""

    def __init__(self, programs: Programs, place: Path, mechanisms: str = "plain login xoauth2", failure_delay: int = 0) -> None:
        """``place`` is a directory that all users may enter."""
        environment.install_dovecot()
        self.directory = place / "dovecot"
        self.auth, self.userdb = f"unix:{self.directory}/auth", f"unix:{self.directory}/userdb"
        self.port: int = free_port()
        self._programs = programs
        self._servers = [Answers(token_answer), Answers(policy_answer)]
        tokens, policy = (server.url for server in self._servers)
        self.directory.mkdir(parents=True)
        daemon = pwd.getpwnam("daemon")
        extra = {"moved": "nologin reason=Moved", "elsewhere": "proxy host=192.0.2.1"}
        lines = []
        for name in ("joe", "ann", "banned", "tarpit", *extra):
            home = self.directory / "mail" / "d.example" / name
            home.mkdir(parents=True)
            os.chown(home, daemon.pw_uid, daemon.pw_gid)
            home.chmod(0o700)
            owner = f"{daemon.pw_uid}:{daemon.pw_gid}"
            lines.append(f"{name}@d.example:{{PLAIN}}secret:{owner}::{home}::{extra.get(name, '')}\n")
        (self.directory / "users").write_text("".join(lines))
        (self.directory / "oauth2").write_text(OAUTH2.format(tokens=f"{tokens}/?access_token="))
        settings = {"port": self.port, "mechanisms": mechanisms, "failure_delay": failure_delay, "policy": f"{policy}/"}
        (self.directory / "dovecot.conf").write_text(CONFIGURATION.format(directory=self.directory, **settings))
        self.start()

    @property
    def maildirs(self) -> str:
        """The path of the recipients' Maildirs, for ``--deliver``."""
        return f"{self.directory}/mail/%d/%n/Maildir"

    def start(self) -> None:
        words = command(environment.INSTALLED / "dovecot", "/usr/sbin/dovecot", "-F", "-c", self.directory / "dovecot.conf")
        self.process = self._programs.start(*words, port=self.port, log="dovecot.log")
        until(lambda: all(map(_answers, (self.auth, self.userdb))), "Dovecot answers")

    def kill(self) -> None:
        """All its processes at once, with SIGKILL."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        until(lambda: not listening(self.port), "Dovecot gone")
        for name in ("auth", "userdb"):
            (self.directory / name).unlink(missing_ok=True)
        shutil.rmtree(self.directory / "base")

    def auth_process(self) -> int:
        """The process that answers on its sockets."""
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                pid = int(status.parts[2])
                if status.read_bytes().startswith(b"dovecot/auth\0") and os.getpgid(pid) == self.process.pid:
                    return pid
        raise AssertionError("no auth process")

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def read(self, user: str) -> list[bytes]:
        """The messages that this user's mail client sees."""
        imap = imaplib.IMAP4("127.0.0.1", self.port, timeout=60)
        imap.login(user, "secret")
        imap.select()
        numbers = imap.search(None, "ALL")[1][0].split()
        messages = [part[1] for number in numbers for part in imap.fetch(number, "(BODY.PEEK[])")[1] if isinstance(part, tuple)]
        imap.logout()
        return messages

    def close(self) -> None:
        for server in self._servers:
            server.close()


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(5)
        sock.connect(address.removeprefix("unix:"))
        return sock.recv(8) == b"VERSION\t"
    return False
