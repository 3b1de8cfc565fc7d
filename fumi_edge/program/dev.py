"""--dev: a trial in one process, which leaves nothing on the disk except ./maildir.

It makes a self-signed certificate with the openssl program, runs the core on a Unix socket as the backend, prints commands
that send a test message, and shows received mail at /mail.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fumi_core.runtime.addresses import parse_address
from fumi_core.runtime.config_file import ListenerTable
from fumi_core.runtime.metrics_server import Page
from fumi_core.runtime.settings import SettingError
from fumi_edge.backends.addresses import BackendAddress
from fumi_edge.edge import Edge
from fumi_edge.mail_view.pages import MailView
from fumi_edge.program.flags import Flags

LISTEN, STARTTLS, METRICS = "127.0.0.1:4650", "127.0.0.1:5870", "127.0.0.1:9465"
MAILDIR = "./maildir"

_OPENSSL = (
    *("openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "30"),
    *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"),
)


@contextlib.contextmanager
def directory(flags: Flags, tables: Sequence[ListenerTable] = ()) -> Iterator[str]:
    """A private directory with cert.pem and key.pem, removed at the end.

    Raises SettingError for flags that --dev does not allow, and when openssl is missing or fails.
    """
    _check(flags)
    if tables:
        raise SettingError(f"--dev has its own listeners: remove the {tables[0].section} tables, or --config")
    with tempfile.TemporaryDirectory(prefix="fumi-dev-") as path:
        command = [*_OPENSSL, "-keyout", f"{path}/key.pem", "-out", f"{path}/cert.pem"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        except FileNotFoundError:
            raise SettingError("--dev makes its certificate with the openssl program, which is not installed") from None
        except subprocess.CalledProcessError as error:
            last = error.stderr.strip().rpartition("\n")[2]
            raise SettingError(f"openssl could not make a certificate: {last}") from None
        yield path


def _check(flags: Flags) -> None:
    if flags["cert"] or flags["key"] or flags["backend"] or flags["app"]:
        raise SettingError("--dev has its own certificate and server: remove --cert, --key, --backend and MODULE:APP")
    if flags["workers"] != 1 or flags["user"]:
        raise SettingError("--dev is one process of the user who starts it: remove --workers and --user")
    if flags["accept_proxy"] or flags["hide_starttls"]:
        raise SettingError(
            "--dev prints commands for clients that connect directly and use STARTTLS: remove --accept-proxy and --hide-starttls"
        )


def defaults(flags: Flags, given: Collection[str], path: str) -> Flags:
    """The flags with the values of --dev; addresses, and a drain timeout that was given, are kept."""
    return {
        **flags,
        # A mail client may keep a connection open, and a trial should end at once.
        "drain_timeout": flags["drain_timeout"] if "drain_timeout" in given else 0.0,
        "cert": (_take(f"{path}/cert.pem"),),
        "key": (_take(f"{path}/key.pem"),),
        "backend": (BackendAddress("unix", path=f"{path}/core.sock"),),
        "proxy_protocol": "v2",
        "listen": flags["listen"] or (parse_address(LISTEN),),
        "starttls_listen": flags["starttls_listen"] or (parse_address(STARTTLS),),
        "metrics": flags["metrics"] or parse_address(METRICS),
    }


def _take(path: str) -> bytes:
    """Read a file and remove it, so that no other process can read the key."""
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    return data


class DevCore:
    """The core in the edge's event loop, delivering to ./maildir."""

    def __init__(self, edge: Edge, path: str) -> None:
        self._edge = edge
        self._path = path
        self._core: Any = None

    async def start(self) -> None:
        from fumi_core.program.builtin import build

        self._core = build(
            f"maildir:{MAILDIR}",
            proxy_protocol="required",
            trusted_proxies=("unix",),
            close_timeout=self._edge.settings.drain_timeout,
        )
        await self._core.listen(path=f"{self._path}/core.sock")

    async def close(self) -> None:
        await self._core.close()

    def pages(self) -> Mapping[str, Page]:
        """The pages that show received mail."""
        return MailView(Path(MAILDIR).resolve()).pages()

    def instructions(self) -> str:
        """Commands to copy and paste."""
        tls, starttls = (self._address(each) for each in (False, True))
        host, _, port = starttls.rpartition(":")
        message = r"From: a@example.org\nTo: b@example.org\nSubject: test\n\nhello\n"
        crlf = message.replace(r"\n", r"\r\n")
        return f"""
This server accepts mail for every address and stores it in ./maildir/new. Each of these sends a message, from another terminal:

  swaks --server {tls} --tls-on-connect --from a@example.org --to b@example.org
  swaks --server {starttls} --tls --from a@example.org --to b@example.org
  printf '{crlf}' | \\
      curl --insecure --url smtps://{tls} --mail-from a@example.org --mail-rcpt b@example.org --upload-file -
  printf 'EHLO me\\nMAIL FROM:<a@example.org>\\nRCPT TO:<b@example.org>\\nDATA\\n{message}.\\nQUIT\\n' | \\
      openssl s_client -quiet -crlf -starttls smtp -connect {starttls}
  python3 -c 'import smtplib, ssl; s = smtplib.SMTP("{host.strip("[]")}", {port}); \\
      s.starttls(context=ssl._create_unverified_context()); s.sendmail("a@example.org", ["b@example.org"], "{message}"); s.quit()'

The certificate is self-signed. Stop with Ctrl-C.

  Received mail: http://{self._metrics()}/mail
  Status page:   http://{self._metrics()}/ (metrics at /metrics)
"""

    def _address(self, starttls: bool) -> str:
        for listener in self._edge.listeners:
            if listener.starttls is starttls and isinstance(listener.address, tuple):
                return _for_clients(*listener.address)
        return "127.0.0.1:0"

    def _metrics(self) -> str:
        (sock, *_) = self._edge.metrics_sockets
        name = sock.getsockname()
        return _for_clients(name[0], name[1]) if isinstance(name, tuple) else f"unix:{name}"


def _for_clients(host: str, port: int) -> str:
    """The address to connect to on this host, of a socket that listens at this one."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
