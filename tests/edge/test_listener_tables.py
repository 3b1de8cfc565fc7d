"""``[[edge.listener]]``: several listeners in one process, each with settings of its own."""

from __future__ import annotations

import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, run
from tests.support.certificates import CertificateFiles, MakeCertificate
from tests.support.peer import Peer
from tests.support.ports import free_port
from tests.support.starter import finished
from tests.support.waiting import PATIENCE, until


def named(name: bytes) -> Callable[[Peer], None]:
    """A backend that greets with its name, and answers every line with it, up to QUIT."""

    def handler(peer: Peer) -> None:
        peer.say(b"220 " + name + b"\r\n")
        while peer.line() not in (b"", b"QUIT\r\n"):
            peer.say(b"250 " + name + b"\r\n")

    return handler


def pair(certificate: CertificateFiles) -> str:
    return f'cert = "{certificate[0]}"\nkey = "{certificate[1]}"'


def trusting(*certificates: CertificateFiles) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for cert, _ in certificates:
        context.load_verify_locations(cert)
    return context


class Tables:
    """A fumi-edge whose file has an [edge] and listeners of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.program: Program

    def write(self, edge: str, *listeners: str) -> None:
        self.path.write_text("\n".join([f"[edge]\n{edge}", *(f"[[edge.listener]]\n{x}" for x in listeners)]))

    def start(self, *flags: str) -> Program:
        self.program = Program("--config", str(self.path), "--metrics", "127.0.0.1:0", "--health-interval", "0", *flags)
        return self.program

    def reload(self, outcome: str) -> dict[str, str]:
        """Send SIGHUP, and return the next line in the log with this event."""
        before = len(self.program.events(outcome))
        self.program.process.send_signal(signal.SIGHUP)
        return until(lambda: self.program.events(outcome)[before:], outcome)[0]

    def check(self) -> tuple[int, list[str]]:
        return run("--config", self.path, "--check")


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Tables]:
    tables = Tables(tmp_path / "edge.toml")
    yield tables
    if hasattr(tables, "program"):
        tables.program.stop()
        assert tables.program.noise == []
        assert not [entry for entry in tables.program.logs if "traceback" in entry]


@pytest.fixture
def other(make_certificate: MakeCertificate) -> CertificateFiles:
    """A certificate for the same name as the usual one."""
    return make_certificate("localhost")


def at(port: int, mode: str = "starttls", *lines: str) -> str:
    return "\n".join([f'address = "127.0.0.1:{port}"', f'mode = "{mode}"', *lines])


def rejected(client: Peer) -> bool:
    return client.reply()[-1].startswith(b"421 4.7.0")


def test_three_listeners_of_one_process_have_certificates_backends_rules_and_limits_of_their_own(
    tables: Tables, backend: StartBackend, clients: Clients, certificate: CertificateFiles, other: CertificateFiles
) -> None:
    public, submission = backend(named(b"mx")), backend(named(b"submission"))
    mx, msa, msas = free_port(), free_port(), free_port()
    own = f'backend = "{submission.address}"\n{pair(other)}'
    tables.write(
        f'{pair(certificate)}\nbackend = "{public.address}"',
        at(mx, "starttls", "max-clients-per-ip = 1"),
        at(msa, "starttls", "require-tls = true", own),
        at(msas, "tls", 'min-tls = "1.3"', own),
    )
    program = tables.start("--workers", "2")

    held = clients.plain(mx)
    assert held.reply() == [b"220 mx\r\n"]
    assert held.ask(b"MAIL FROM:<>\r\n") == [b"250 mx\r\n"]
    # The limit is for each of the two workers.
    more = [clients.plain(mx) for _ in range(2)]
    assert any(rejected(each) for each in more)

    plain = [clients.plain(msa) for _ in range(3)]
    assert [each.reply() for each in plain] == [[b"220 submission\r\n"]] * 3
    assert plain[0].ask(b"MAIL FROM:<>\r\n")[0].startswith(b"530 5.7.0")
    assert plain[0].ask(b"STARTTLS\r\n")[0].startswith(b"220")
    upgraded = clients.upgrade(plain[0], context=trusting(other))
    assert upgraded.ask(b"NOOP\r\n") == [b"250 submission\r\n"]

    assert clients.tls(msas, context=trusting(other)).line() == b"220 submission\r\n"
    with pytest.raises(ssl.SSLCertVerificationError):
        clients.tls(msas, context=trusting(certificate))
    old = trusting(other)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        clients.tls(msas, context=old)

    assert [entry["mode"] for entry in program.events("listening")] == ["starttls", "starttls", "tls"]
    served = {(entry["file"], entry["listeners"]) for entry in program.events("serving certificate")}
    assert served == {
        (str(certificate[0]), f"127.0.0.1:{mx}"),
        (str(other[0]), f"127.0.0.1:{msa}"),
        (str(other[0]), f"127.0.0.1:{msas}"),
    }
    page = program.fetch("/")[1]
    assert all(f"127.0.0.1:{port}" in page for port in (mx, msa, msas))
    assert public.address in page
    assert submission.address in page
    until(lambda: program.metric("fumi_edge_handshakes_total", listener=f"127.0.0.1:{msas}", result="ok") == 1)


def test_a_reload_changes_one_listener_and_leaves_its_open_connections_and_the_other_listeners(
    tables: Tables, backend: StartBackend, clients: Clients, certificate: CertificateFiles, other: CertificateFiles
) -> None:
    one, two = backend(named(b"one")), backend(named(b"two"))
    first, second = free_port(), free_port()
    edge = f'{pair(certificate)}\nbackend = "{one.address}"'
    tables.write(edge, at(first, "tls"), at(second, "tls"))
    program = tables.start("--workers", "2")
    open_before = clients.tls(second)
    assert open_before.line() == b"220 one\r\n"
    tables.write(edge, at(first, "tls"), at(second, "tls", f'backend = "{two.address}"', pair(other)))
    tables.reload("reloaded")
    assert clients.tls(second, context=trusting(other)).line() == b"220 two\r\n"
    assert clients.tls(first).line() == b"220 one\r\n"
    assert open_before.ask(b"NOOP\r\n") == [b"250 one\r\n"]
    until(lambda: f'fumi_edge_backend_up{{backend="{two.address}"}} 1.0' in program.fetch("/metrics")[1])
    # And back: backends that no listener uses any more are neither checked nor shown.
    tables.write(edge, at(first, "tls"), at(second, "tls"))
    tables.reload("reloaded")
    assert clients.tls(second).line() == b"220 one\r\n"
    until(lambda: two.address not in program.fetch("/")[1])


def test_a_wrong_table_changes_nothing_at_a_reload_and_the_log_says_why(
    tables: Tables, backend: StartBackend, clients: Clients, certificate: CertificateFiles
) -> None:
    one, port = backend(named(b"one")), free_port()
    edge = f'{pair(certificate)}\nbackend = "{one.address}"'
    tables.write(edge, at(port))
    tables.start()
    for lines, error in (
        (("require-tls = 1",), f"[[edge.listener]] 127.0.0.1:{port}: require-tls = 1: write true or false"),
        (('cert = "/nowhere.pem"',), "/nowhere.pem"),
        (('ciphers = "none"',), f"[[edge.listener]] 127.0.0.1:{port}: --ciphers: 'none' selects no"),
    ):
        tables.write(edge.replace(one.address, "127.0.0.1:1"), at(port, "starttls", *lines))
        assert error in tables.reload("reload failed: the old settings stay in use")["error"]
        assert clients.plain(port).line() == b"220 one\r\n"


def test_another_address_needs_a_restart_and_the_listener_that_the_file_no_longer_has_keeps_its_settings(
    tables: Tables, backend: StartBackend, clients: Clients, certificate: CertificateFiles
) -> None:
    one, two = backend(named(b"one")), backend(named(b"two"))
    first, second = free_port(), free_port()
    own = f'backend = "{two.address}"'
    tables.write(f'{pair(certificate)}\nbackend = "{one.address}"', at(first), at(second, "starttls", own))
    tables.start()
    tables.write(f'{pair(certificate)}\nbackend = "{one.address}"', at(first, "starttls", "require-tls = true"), at(free_port()))
    assert tables.reload("settings changed that need a restart")["settings"] == "listener"
    assert clients.plain(second).line() == b"220 two\r\n"
    changed = clients.plain(first)
    assert changed.line() == b"220 one\r\n"
    assert changed.ask(b"MAIL FROM:<>\r\n")[0].startswith(b"530")


def test_a_backend_of_several_listeners_is_checked_once_and_readiness_is_for_all_of_them(
    tables: Tables, backend: StartBackend, certificate: CertificateFiles
) -> None:
    checks: list[str] = []

    def handler(peer: Peer) -> None:
        checks.append(peer.header.command)
        peer.say(b"220 hi\r\n")
        assert peer.line() == b"QUIT\r\n"

    shared, gone = backend(handler), backend()
    gone.close()
    balance = f'backend = ["{shared.address}"]\nbalance = "first"'
    tables.write(
        f'{pair(certificate)}\nbackend = "{shared.address}"', at(free_port()), at(free_port(), "tls", balance),
        at(free_port(), "tls", f'backend = "{gone.address}"'),
    )  # fmt: skip
    program = tables.start("--health-interval", "600")
    until(lambda: program.fetch("/readyz") == (503, f"backend {gone.address}: Connection refused\n"), "the first checks")
    assert program.events("backend down")[0]["backends_up"] == 0
    program.stop()
    assert checks == ["LOCAL"]


def test_readiness_without_health_checks_checks_the_backends_of_all_listeners_concurrently(
    tables: Tables, backend: StartBackend, certificate: CertificateFiles
) -> None:
    """Each of these takes as long as it may, and answers only when both are being checked."""
    asked = threading.Barrier(2)

    def handler(peer: Peer) -> None:
        asked.wait(PATIENCE)
        peer.say(b"220 hi\r\n")
        assert peer.line() == b"QUIT\r\n"

    tables.write(pair(certificate), *(at(free_port(), "tls", f'backend = "{backend(handler).address}"') for _ in range(2)))
    assert tables.start().fetch("/readyz") == (200, "ready\n")


def test_check_looks_at_each_listeners_backends_certificates_and_address(
    tables: Tables, backend: StartBackend, certificate: CertificateFiles
) -> None:
    up, port = backend(), free_port()
    edge = f'{pair(certificate)}\nbackend = "{up.address}"'
    tables.write(edge, at(port), at(free_port(), "tls"))
    assert tables.check() == (0, [])
    tables.write(edge, at(port, "starttls", 'backend = "127.0.0.1:9"'), 'address = "192.0.2.1:25"\nmode = "tls"')
    assert tables.check()[1] == [
        "Error: [[edge.listener]] 192.0.2.1:25: Cannot assign requested address (this machine has no such address);"
        " backend 127.0.0.1:9: Connection refused"
    ]
    tables.write(edge, at(port), at(port))
    assert tables.check() == (2, [f"Error: [[edge.listener]] 127.0.0.1:{port} is given twice: remove one"])


def test_the_edge_itself_needs_no_certificate_and_no_backend_if_each_listener_has_its_own(
    tables: Tables, backend: StartBackend, certificate: CertificateFiles
) -> None:
    own = f'backend = "{backend().address}"\n{pair(certificate)}'
    tables.write("", at(free_port(), "tls", own), at(free_port(), "starttls", own))
    assert tables.check() == (0, [])
    tables.write("", at(free_port(), "tls", own), at(1, "starttls", pair(certificate)))
    assert tables.check()[1][0].startswith("Error: [[edge.listener]] 127.0.0.1:1: no backend: name one")


APP = """
from fumi_core import Fumi
app = Fumi(name="mx.example", auth_optional=True, hide_starttls=True)
"""


def test_an_app_is_served_by_all_of_them_and_its_listeners_have_no_backends(
    tables: Tables, clients: Clients, tmp_path: Path, certificate: CertificateFiles
) -> None:
    (tmp_path / "myapp.py").write_text(APP)
    first, second = free_port(), free_port()
    tables.write(pair(certificate), at(first), at(second, "tls"))
    tables.program = Program("--config", "edge.toml", "myapp:app", cwd=tmp_path)
    assert clients.tls(second).line().startswith(b"220 mx.example ")
    client = clients.plain(first)
    assert client.line().startswith(b"220 mx.example ")
    assert b"STARTTLS" not in b"".join(client.ask(b"EHLO me\r\n"))
    tables.write(pair(certificate), at(first, "tls", 'balance = "first"'))
    done = finished("fumi-edge", "--config", "edge.toml", "myapp:app", cwd=tmp_path)
    assert done.stderr == (
        f"Error: [[edge.listener]] 127.0.0.1:{first}: balance is for backends, which myapp:app replaces: remove it\n"
    )


def one_line(tables: Tables, text: str) -> str:
    """The error about a file."""
    tables.path.write_text(text)
    status, lines = tables.check()
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[edge]\nlistener = []", "write each listener under a [[edge.listener]] of its own"),
        ("[edge]\nlistener = [1]", "write each listener under a [[edge.listener]] of its own"),
        ('[edge.listener]\naddress = ":25"', "write each listener under a [[edge.listener]] of its own"),
        ('[[listener]]\naddress = ":25"', "unknown key 'listener': write [[edge.listener]]"),
        ('[[edge.listener]]\nmode = "tls"', "[[edge.listener]] number 1: no address: add one"),
        ('[[edge.listener]]\naddress = [":25"]', '[[edge.listener]] number 1: address = [":25"]: write a string, in quotes'),
        ('[[edge.listener]]\naddress = "smtp"', "[[edge.listener]] smtp: address = \"smtp\": 'smtp' is not an address"),
        ('[[edge.listener]]\naddress = ":25"', '[[edge.listener]] :25: no mode: add mode = "tls" or mode = "starttls"'),
        ('[[edge.listener]]\naddress = ":25"\nmode = "ssl"', "[[edge.listener]] :25: mode = \"ssl\": 'ssl' is not one of"),
        ('[[edge.listener]]\naddress = ":25"\nmode = true', "[[edge.listener]] :25: mode = true: write a string, in quotes"),
    ],
)
def test_a_file_whose_tables_are_not_listeners_is_one_line(tables: Tables, text: str, error: str) -> None:
    assert error in one_line(tables, text)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("require-tls = 'yes'", ':25: require-tls = "yes": write true or false'),
        ("reqire-tls = true", ":25: unknown key 'reqire-tls': is it require-tls?"),
        ("workers = 2", ":25: unknown key 'workers': it is for all listeners: write it under [edge]"),
        ("max-clients = 2", ":25: unknown key 'max-clients': it is for all listeners"),
        ("check = true", ":25: unknown key 'check': "),
        ("require-tls = true\nrequire_tls = true", ":25: require-tls and require_tls are the same setting; remove one"),
        ("rate-per-ip = 10", ":25: rate-per-ip = 10: write a string, in quotes"),
        ("rate-per-ip = '10'", "'10' is not a rate"),
        ("max-clients-per-ip = 0", ":25: max-clients-per-ip = 0: "),
        ("idle-timeout = nan", ":25: idle-timeout = "),
        ("backend = ['nonsense']", "'nonsense' is not an address"),
        ("backend = '127.0.0.1:0'", ":25: 127.0.0.1:0 is not a backend"),
        ("client-cert = 'required'", ":25: --client-cert needs the CAs of client certificates"),
        ("key = 'key.pem'", ":25: key without cert: name both"),
        ("trusted-proxy = '10.0.0.0/8'", ":25: trusted-proxy has no effect without accept-proxy"),
        ("proxy-protocol = 'v1'\n[[edge.listener]]\naddress = ':26'\nmode = 'tls'",
         "backend 127.0.0.1:9: proxy-protocol is 'v1' for one listener and 'v2' for another"),
        ("[[edge.listener]]\naddress = ':25'\nmode = 'starttls'",
         "[[edge.listener]] :25 is given twice: remove one"),
        ("[[edge.listener]]\naddress = '127.0.0.1:25'\nmode = 'tls'",
         "[[edge.listener]] 127.0.0.1:25 is part of [[edge.listener]] :25, which is every address of this machine"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_a_second_table_that_does_not_fit_is_one_line(
    tables: Tables, certificate: CertificateFiles, lines: str, error: str
) -> None:
    good = f'[edge]\n{pair(certificate)}\nbackend = "127.0.0.1:9"\n[[edge.listener]]\naddress = ":25"\nmode = "tls"\n'
    assert error in one_line(tables, good + lines)


@pytest.mark.parametrize(
    ("edge", "mode", "error"),
    [
        ("require-tls = true", "tls", "require-tls applies to STARTTLS listeners only, and no [[edge.listener]] is one"),
        ("trusted-proxy = ['10.0.0.0/8']", "tls", "trusted-proxy has no effect: no [[edge.listener]] has accept-proxy = true"),
        ("listen = [':465']", "tls", "--listen and [[edge.listener]] exclude each other"),
        ("starttls-listen = [':25']", "tls", "--starttls-listen and [[edge.listener]] exclude each other"),
    ],
)
def test_a_setting_of_the_edge_that_does_not_fit_its_tables_is_one_line(
    tables: Tables, certificate: CertificateFiles, edge: str, mode: str, error: str
) -> None:
    text = f'[edge]\n{pair(certificate)}\nbackend = "127.0.0.1:9"\n{edge}\n[[edge.listener]]\n{at(25, mode)}'
    assert error in one_line(tables, text)


def test_a_trial_has_no_tables(tables: Tables) -> None:
    tables.write("", at(25))
    status, lines = run("--config", tables.path, "--dev")
    assert (status, lines) == (2, ["Error: --dev has its own listeners: remove the [[edge.listener]] tables, or --config"])


def test_listeners_in_the_environment_and_in_tables_exclude_each_other(tables: Tables, certificate: CertificateFiles) -> None:
    tables.write(f'{pair(certificate)}\nbackend = "127.0.0.1:9"', at(25))
    status, lines = run("--config", tables.path, environment={"FUMI_EDGE_LISTEN": ":465"})
    assert (status, len(lines)) == (2, 1)
    assert "--listen and [[edge.listener]] exclude each other" in lines[0]
