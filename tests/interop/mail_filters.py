"""rspamd and OpenDKIM with configurations of their own, on loopback. Debian's packages are unpacked and never installed."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
from pathlib import Path

from tests.bench import environment
from tests.interop.mail_servers import command
from tests.support.certificates import openssl
from tests.support.ports import free_port
from tests.support.programs import Programs, listening
from tests.support.waiting import until

RSPAMD = """
lua = "$RULESDIR/rspamd.lua"
options {{
    pidfile = "{directory}/pid";
    tempdir = "{directory}";
    url_tld = "{directory}/tld";
    filters = "";
    dns {{ nameserver = ["127.0.0.1:9"]; timeout = 0.1s; retransmits = 1; }}
}}
logging {{ type = "console"; level = "info"; }}
actions {{ reject = 15; add_header = 6; }}
worker "rspamd_proxy" {{
    bind_socket = "127.0.0.1:{port}";
    milter = yes;
    timeout = 30s;
    upstream "local" {{ default = yes; self_scan = yes; }}
    count = 1;
}}
modules {{ path = "$PLUGINSDIR"; }}
milter_headers {{ use = ["x-spamd-result", "x-rspamd-queue-id"]; skip_local = false; }}
"""


class Rspamd:
    """A spam filter that knows no rules but GTUBE, and adds its result to each message."""

    def __init__(self, programs: Programs) -> None:
        home = environment.install_filter("rspamd")
        self.port: int = free_port()
        self.directory = programs.directory / "rspamd"
        self.directory.mkdir()
        # The whole list of top-level domains takes seconds to compile.
        (self.directory / "tld").write_text("example\n")
        (self.directory / "rspamd.conf").write_text(RSPAMD.format(directory=self.directory, port=self.port))
        self._programs = programs
        words: list[str | Path] = ["/usr/bin/rspamd", "-f", "-i", "-c", self.directory / "rspamd.conf"]
        words += [f"--var={name}={self.directory}" for name in ("DBDIR", "RUNDIR", "LOGDIR")]
        self._command = command(home, *words, f"--var=CONFDIR={home}/etc/rspamd")
        self.start()

    def start(self) -> None:
        self.process = self._programs.start(*self._command, port=self.port, log="rspamd.log")

    def kill(self) -> None:
        """All its processes at once, with SIGKILL."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        until(lambda: not listening(self.port), "rspamd gone")


class OpenDKIM:
    """Signs mail of one domain, or checks the signatures of such mail."""

    def __init__(self, programs: Programs, name: str, *settings: str) -> None:
        home = environment.install_filter("opendkim")
        self.port: int = free_port()
        path = programs.directory / f"{name}.conf"
        usual = ["Background no", "RequireSafeKeys no", "UserID root", f"Socket inet:{self.port}@127.0.0.1", "LogWhy yes"]
        path.write_text("".join(f"{line}\n" for line in [*usual, *settings]))
        words = ("/usr/sbin/opendkim", "-f", "-x", path)
        programs.start(*command(home, *words), port=self.port, log=f"{name}.log")


class DKIM:
    """A signer, and a verifier that knows its key."""

    def __init__(self, programs: Programs, canonicalization: str, domain: str = "b.example") -> None:
        key, keys = programs.directory / "dkim.pem", programs.directory / "dkim.keys"
        openssl("genrsa", "-out", key, "2048")
        made = subprocess.run(["openssl", "rsa", "-in", key, "-pubout", "-outform", "DER"], capture_output=True, check=True)
        public = base64.b64encode(made.stdout).decode()
        keys.write_text(f"s._domainkey.{domain} v=DKIM1; k=rsa; p={public}\n")
        signs = (f"Domain {domain}", "Selector s", f"KeyFile {key}", f"Canonicalization {canonicalization}")
        self.signer = OpenDKIM(programs, "signer", "Mode s", *signs)
        self.verifier = OpenDKIM(programs, "verifier", "Mode v", f"TestPublicKeys {keys}", "AlwaysAddARHeader yes")
