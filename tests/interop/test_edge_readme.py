"""Every command of fumi_edge's README does what stands there, and its tables are those of the program."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import smtplib
import socket
import ssl
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi, MailContext, Next, Session
from fumi_core.testing import RunningServer, running
from fumi_edge.program.listeners import LISTENER_KEYS
from tests.bench import environment
from tests.interop.starting import StartCore
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.readme import PATH, ROOT, blocks, other_ports, sections, sh, table
from tests.support.starter import Process
from tests.support.waiting import until

README = re.sub(r"<!--.*?-->", "", (ROOT / "fumi_edge" / "README.md").read_text(), flags=re.DOTALL)
SECTIONS = {section.title: section.text for section in sections(README)}
RECIPES = ("Port 25: mail from other servers", "Port 587: submission with STARTTLS", "Port 465: submission with implicit TLS",
           "Let's Encrypt", "Clients with certificates", "Behind a load balancer", "Postfix", "Any SMTP server",
           "Several backends", "A core on another host, over TLS", "An app in the same program", "All of it in a file",
           "Listeners with settings of their own")  # fmt: skip
CLIENT = ("127.0.0.9", 0)
"""The address that clients come from, which is not this host's usual one."""
TEXT = "Subject: hi\r\n\r\nhi\r\n"


def block(title: str, kind: str = "sh") -> str:
    (text,) = (text for each, text in blocks(SECTIONS[title]) if each == kind)
    return text


def tables(title: str) -> list[list[str]]:
    return [row for part in SECTIONS[title].split("\n\n") if part.startswith("|") for row in table(part)]


class Kitchen:
    """Cooks recipes: their commands run as they stand there, on free ports and with the files of the test."""

    def __init__(self, programs: Programs, certificate: CertificateFiles) -> None:
        self.programs = programs
        self.directory: Path = programs.directory
        self.ports = {port: free_port() for port in ("25", "465", "587", "2465", "2525", "2587", "9465", "10025")}
        self.context = ssl.create_default_context(cafile=str(certificate[0]))
        for path in certificate:
            shutil.copy(path, self.directory)
        self.sessions: list[Session] = []

    def here(self, text: str, *changes: tuple[str, str]) -> str:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return other_ports(text, self.ports)

    def cook(self, command: str, *changes: tuple[str, str], port: str = "465") -> Process:
        words = self.here(command, *changes).strip()
        return self.programs.start("sh", "-c", f"PATH={PATH} exec {words}", port=self.ports[port], log="edge.log")

    def log(self) -> str:
        return (self.directory / "edge.log").read_text()

    def plain(self, port: str = "25") -> smtplib.SMTP:
        return smtplib.SMTP("localhost", self.ports[port], timeout=60, source_address=CLIENT)

    def starttls(self, port: str = "25") -> smtplib.SMTP:
        smtp = self.plain(port)
        smtp.starttls(context=self.context)
        return smtp

    def tls_socket(self) -> ssl.SSLSocket:
        sock = socket.create_connection(("localhost", self.ports["465"]), timeout=60)
        return self.context.wrap_socket(sock, server_hostname="localhost")

    def tls(self) -> smtplib.SMTP_SSL:
        return smtplib.SMTP_SSL("localhost", self.ports["465"], timeout=60, context=self.context, source_address=CLIENT)


def send(client: smtplib.SMTP) -> None:
    with client as smtp:
        smtp.sendmail("a@example.com", ["b@example.org"], TEXT)


@pytest.fixture
def kitchen(programs: Programs, certificate: CertificateFiles) -> Kitchen:
    return Kitchen(programs, certificate)


@pytest.fixture
def core(kitchen: Kitchen) -> Iterator[Callable[..., RunningServer]]:
    """A server that keeps the session of each message; by default where the recipes expect it."""
    with contextlib.ExitStack() as servers:

        def start(**options: Any) -> RunningServer:
            app = Fumi(auth_optional=True, **{"proxy_protocol": "required", "close_timeout": 0.2, **options})

            async def keep(ctx: MailContext, next: Next) -> None:
                kitchen.sessions.append(ctx.session)
                await next()

            app.on_mail_from(keep)
            server = servers.enter_context(running(app))
            kitchen.ports["2525"] = server.port
            return server

        yield start


def test_every_recipe_is_cooked_here() -> None:
    titles = list(SECTIONS)
    assert tuple(titles[titles.index("Recipes") + 1 : titles.index("What happens at STARTTLS")]) == RECIPES


def test_the_recipe_for_port_25_takes_mail_from_other_servers(kitchen: Kitchen, core: StartCore) -> None:
    core()
    kitchen.cook(block("Port 25: mail from other servers"), port="25")
    send(kitchen.starttls())
    send(kitchen.plain())
    assert [session.secure for session in kitchen.sessions] == [True, False]
    # The edge may learn a moment later that these two have hung up.
    until(lambda: kitchen.log().count("connection ended") == 2, "their end")
    with contextlib.ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(kitchen.plain())
        with pytest.raises(smtplib.SMTPConnectError, match="421"):
            kitchen.plain()


def test_the_recipe_for_port_587_takes_submissions_by_starttls(kitchen: Kitchen, core: StartCore) -> None:
    core()
    kitchen.cook(block("Port 587: submission with STARTTLS"), port="587")
    with kitchen.plain("587") as smtp:
        assert smtp.mail("a@example.com")[0] == 530
    send(kitchen.starttls("587"))
    assert kitchen.sessions[0].secure


def test_the_recipe_for_port_465_takes_submissions_over_tls(kitchen: Kitchen, core: StartCore) -> None:
    core()
    kitchen.cook(block("Port 465: submission with implicit TLS"))
    send(kitchen.tls())
    (session,) = kitchen.sessions
    assert session.tls
    assert (session.remote_address, session.tls.sni) == ("127.0.0.9", "localhost")


def test_the_recipe_for_lets_encrypt_serves_certbots_files(
    kitchen: Kitchen, core: StartCore, certificate: CertificateFiles
) -> None:
    core()
    live = kitchen.directory / "letsencrypt" / "live" / "mail.example.org"
    live.mkdir(parents=True)
    for source, name in zip(certificate, ("fullchain.pem", "privkey.pem"), strict=True):
        (live / f"{name}.1").write_bytes(source.read_bytes())
        (live / name).symlink_to(f"{name}.1")
    change = ("/etc/letsencrypt", str(live.parents[1]))
    edge = kitchen.cook(block("Let's Encrypt"), change)
    send(kitchen.tls())
    (live / "privkey.pem.1").write_text("not yet\n")
    edge.send_signal(signal.SIGHUP)
    until(lambda: "certificate not loaded" in kitchen.log(), "the complaint")
    send(kitchen.starttls())
    assert kitchen.programs.stop(edge) == 0
    (live / "privkey.pem.1").write_bytes(certificate[1].read_bytes())
    (one,) = re.findall(r"`(--cert /etc/letsencrypt/live/\S+)`", SECTIONS["Let's Encrypt"])
    sh(kitchen.here(f"fumi-edge {one} --backend 127.0.0.1:2525 --check", change), kitchen.directory)


def test_the_recipe_for_client_certificates_accepts_clients_with_one(
    kitchen: Kitchen, core: StartCore, certificate: CertificateFiles
) -> None:
    core()
    shutil.copy(certificate[0], kitchen.directory / "clients.pem")
    kitchen.cook(block("Clients with certificates"))
    with pytest.raises((ssl.SSLError, smtplib.SMTPServerDisconnected, OSError)):
        send(kitchen.tls())
    kitchen.context.load_cert_chain(*certificate)
    send(kitchen.tls())
    (session,) = kitchen.sessions
    assert session.tls
    assert session.tls.client_cn == "localhost"


def test_the_recipe_behind_a_load_balancer_names_the_client(kitchen: Kitchen, core: StartCore) -> None:
    core()
    kitchen.cook(block("Behind a load balancer"), ("192.0.2.10", "127.0.0.1"))
    front = free_port()
    text = block("Behind a load balancer", "haproxy").replace("192.0.2.20:25", f"127.0.0.1:{kitchen.ports['25']}")
    text = text.replace("bind :25", f"bind 127.0.0.1:{front}")
    times = "defaults\n    timeout connect 60s\n    timeout client 60s\n    timeout server 60s\n"
    (kitchen.directory / "haproxy.cfg").write_text(times + text)
    kitchen.programs.start("haproxy", "-f", kitchen.directory / "haproxy.cfg", port=front, log="haproxy.log")
    with pytest.raises(smtplib.SMTPServerDisconnected):
        kitchen.plain()
    kitchen.ports["25"] = front
    send(kitchen.starttls())
    (session,) = kitchen.sessions
    assert (session.remote_address, session.local_port) == ("127.0.0.9", front)


MAIN = """
compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
daemon_directory = {postfix}/usr/lib/postfix/sbin
command_directory = {postfix}/usr/sbin
shlib_directory = {postfix}/usr/lib/postfix
meta_directory = {home}
mail_owner = news
setgid_group = uucp
default_privs = games
import_environment = MAIL_CONFIG LD_LIBRARY_PATH TZ LANG=C
maillog_file = {home}/maillog
maillog_file_prefixes = {home}
inet_protocols = ipv4
smtpd_peername_lookup = no
myhostname = mail.example
mydestination =
alias_maps =
mynetworks = 127.0.0.1/32
relay_domains = example.org
relay_transport = discard
"""
MASTER = """
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
proxymap unix - - n - - proxymap
anvil unix - - n - 1 anvil
discard unix - - n - - discard
postlog unix-dgram n - n - 1 postlogd
"""


QUEUE = (
    "active",
    "bounce",
    "corrupt",
    "defer",
    "deferred",
    "flush",
    "hold",
    "incoming",
    "maildrop",
    "private",
    "public",
    "saved",
)


@pytest.fixture
def postfix(kitchen: Kitchen) -> Iterator[Path]:
    """A whole Postfix as far as its queue, unpacked and not installed, with accounts that every Debian has; gives its log."""
    environment.install_postfix()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        # It gives up root, and pytest's own directories are for nobody else.
        home.chmod(0o755)
        (home / "queue" / "pid").mkdir(parents=True)
        for each in (home / "data", *(home / "queue" / name for name in QUEUE)):
            each.mkdir()
            shutil.chown(each, "news")
        (home / "main.cf").write_text(MAIN.format(home=home, postfix=environment.INSTALLED / "postfix"))
        (home / "master.cf").write_text(kitchen.here(block("Postfix", "postfix")) + MASTER)
        libraries = [f"{name}={value}" for name, value in environment.postfix_environment().items()]
        command: list[str | Path] = [
            "env",
            *libraries,
            environment.INSTALLED / "postfix/usr/lib/postfix/sbin/master",
            "-c",
            home,
            "-d",
        ]
        master = kitchen.programs.start(*command, port=kitchen.ports["10025"], log="postfix.log")
        yield home / "maillog"
        kitchen.programs.stop(master)


@pytest.mark.skipif(os.geteuid() != 0, reason="Postfix's master starts as root alone")
def test_the_recipe_for_postfix_delivers_through_it(kitchen: Kitchen, postfix: Path) -> None:
    sh(kitchen.here(block("Postfix").strip() + " --check"), kitchen.directory)
    kitchen.cook(block("Postfix"))
    for client in (kitchen.tls, kitchen.starttls):
        send(client())
        with client() as smtp:
            smtp.ehlo()
            # Neither a second TLS, nor this host's rights for a client from elsewhere.
            assert not smtp.has_extn("starttls")
            smtp.mail("a@example.com")
            assert smtp.rcpt("b@elsewhere.example")[0] == 454
    until(lambda: postfix.read_text().count("status=sent") == 2, "the delivery")
    assert postfix.read_text().count("client=unknown[127.0.0.9]") == 2
    assert "backend down" not in kitchen.log()


def test_the_recipe_for_any_smtp_server_needs_no_proxy_header(kitchen: Kitchen, core: StartCore) -> None:
    core(proxy_protocol="off")
    kitchen.cook(block("Any SMTP server"))
    send(kitchen.tls())
    send(kitchen.starttls())
    assert [(session.remote_address, session.secure) for session in kitchen.sessions] == [("127.0.0.1", False)] * 2


def test_the_recipe_for_several_backends_uses_them_all(kitchen: Kitchen, core: StartCore) -> None:
    first, second = core(), core()
    changes = (("10.0.0.11:2525", f"127.0.0.1:{first.port}"), ("10.0.0.12:2525", f"127.0.0.1:{second.port}"))
    kitchen.cook(block("Several backends"), *changes)
    with kitchen.tls() as one, kitchen.starttls() as other:
        for smtp in (one, other):
            smtp.sendmail("a@example.com", ["b@example.org"], TEXT)
    assert [len(server.messages) for server in (first, second)] == [1, 1]


def test_the_recipe_for_an_app_in_the_same_program_takes_mail_on_both_ports(kitchen: Kitchen) -> None:
    title = "An app in the same program"
    (kitchen.directory / "myapp.py").write_text(block(title, "python"))
    kitchen.cook(block(title))
    send(kitchen.tls())
    send(kitchen.starttls())
    until(lambda: kitchen.log().count("a@example.com") == 2, "two messages in the app")


def test_the_recipe_in_a_file_serves_both_ports(kitchen: Kitchen, core: StartCore) -> None:
    core()
    title = "All of it in a file"
    (kitchen.directory / "edge.toml").write_text(kitchen.here(block(title, "toml")))
    check, run = block(title).strip().splitlines()
    assert sh(check, kitchen.directory) == "configuration OK\n"
    kitchen.cook(run, port="9465")
    send(kitchen.tls())
    send(kitchen.starttls("587"))
    assert json.loads(kitchen.log().splitlines()[0])["event"] == "listening"


def test_the_recipe_for_listeners_with_settings_of_their_own_serves_three_ports(kitchen: Kitchen, core: StartCore) -> None:
    submission = core()
    public = core()
    kitchen.ports["2587"] = submission.port
    title = "Listeners with settings of their own"
    (kitchen.directory / "edge.toml").write_text(kitchen.here(block(title, "toml")))
    check, run = block(title).strip().splitlines()
    assert sh(check, kitchen.directory) == "configuration OK\n"
    kitchen.cook(run, port="9465")
    send(kitchen.plain("25"))
    with kitchen.plain("587") as smtp:
        assert smtp.mail("a@example.com")[0] == 530
    send(kitchen.starttls("587"))
    send(kitchen.tls())
    assert [len(server.messages) for server in (public, submission)] == [1, 2]
    keys = {key for row in tables(title) for key in re.findall(r"`([a-z-]+)`", row[0])}
    assert keys == set(LISTENER_KEYS.flags)


def test_the_metrics_are_those_that_are_served(kitchen: Kitchen, core: StartCore) -> None:
    core()
    kitchen.cook(
        block("Port 465: submission with implicit TLS").strip() + f" --metrics 127.0.0.1:{kitchen.ports['9465']}", port="9465"
    )
    with urllib.request.urlopen(f"http://127.0.0.1:{kitchen.ports['9465']}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    assert json.loads(sh(kitchen.here(block("Metrics")), kitchen.directory))["program"] == "fumi-edge"
    histograms = [line.split()[2] for line in lines if line.startswith("# TYPE") and line.endswith("histogram")]
    served: dict[str, set[str]] = {}
    values: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        name, labels = re.match(r"(\w+)(?:\{(.*?)\})? ", line).groups()  # type: ignore[union-attr]
        name = next((each for each in histograms if name.startswith(each)), name)
        pairs = [pair for pair in re.findall(r'(\w+)="([^"]*)"', labels or "") if pair[0] != "le"]
        served.setdefault(name, set()).update(label for label, _ in pairs)
        for label, value in pairs:
            values.setdefault(f"{name} {label}", set()).add(value)
    documented = {}
    for row in tables("Metrics"):
        name, labels = re.fullmatch(r"`(\w+)(?:\{(.*)\})?`", row[0]).groups()  # type: ignore[union-attr]
        documented[name] = set(labels.split(",")) if labels else set()
        for label in documented[name] & {"result", "reason", "direction"}:
            assert set(re.findall(r"`(\w+)`", row[1])) == values[f"{name} {label}"], name
    assert documented == served


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_line_in_the_log_is_like_the_example(kitchen: Kitchen, core: StartCore, form: str) -> None:
    core()
    kitchen.cook(block("Port 465: submission with implicit TLS").strip() + f" --log-format {form}")
    send(kitchen.tls())
    until(lambda: "connection ended" in kitchen.log(), "the line")
    (real,) = (line for line in kitchen.log().splitlines() if "connection ended" in line)
    shapes = {shape(line, form) for line in (real, block("The log", form).strip())}
    assert len(shapes) == 1


def shape(line: str, form: str) -> tuple[object, ...]:
    """What a line of the log has in common with its like: the fields in their order, and of what kind they are."""
    if form == "json":
        return tuple((name, type(value)) for name, value in json.loads(line).items())
    return tuple(re.sub(r"=\S+", "", re.sub(r"^\S+Z ", "", line)).split())
