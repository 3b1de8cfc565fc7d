"""fumi-edge --emit: what it prints is taken by HAProxy and stunnel, carries mail, and says what it could not carry over."""

from __future__ import annotations

import grp
import pwd
import re
import shlex
import smtplib
import ssl
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from click.testing import CliRunner

from fumi_edge.cli import main
from fumi_edge.emit import template
from tests.interop.starting import ClientCertificate, StartFumiCore
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

Emit = Callable[..., str]


@pytest.fixture
def emit(programs: Programs) -> Emit:
    """What fumi-edge --emit prints; from a directory that has nothing to do with the repository."""

    def run(program: str, *flags: object, status: int = 0, **environment: str) -> str:
        words = [str(flag) for flag in flags]
        return programs.run(BIN / "fumi-edge", "--emit", program, *words, status=status, environment=environment)

    return run


def accepted(programs: Programs, configuration: str) -> None:
    path = programs.directory / "haproxy.cfg"
    path.write_text(configuration)
    said = programs.run("haproxy", "-c", "-f", path)
    assert said in ("Configuration file is valid\n", "")


def settings(configuration: str) -> list[str]:
    """The lines that are no comments, without the spaces in front."""
    return [line.strip() for line in configuration.splitlines() if line.strip() and line.strip()[0] not in "#;"]


def notes(configuration: str, mark: str = "#") -> str:
    """The comment at the top, in one line."""
    return " ".join(line.removeprefix(mark).strip() for line in configuration.partition("\n\n")[0].splitlines())


@pytest.fixture
def both(certificate: CertificateFiles) -> Path:
    return certificate[0].with_name("both.pem")


HAPROXY = {
    "nothing but what is needed": [],
    "listeners": ["--listen", "127.0.0.1:4465", "--listen", "[::1]:4465", "--listen", ":4466", "--listen", "unix:tls.sock"],
    "starttls beside": ["--listen", ":4465", "--starttls-listen", ":2587", "--require-tls", "--hide-starttls"],
    "backends": ["--backend", "[::1]:2526", "--backend", "unix:/run/core.sock", "--balance", "first", "--health-interval", "0.5"],
    "version 1": ["--proxy-protocol", "v1"],
    "no header": ["--proxy-protocol", "off", "--health-interval", "0"],
    "a balancer in front": ["--accept-proxy", "--rate-per-ip", "10/s", "--trusted-proxy", "192.0.2.0/24"],
    "a balancer here": ["--accept-proxy", "--max-clients-per-ip", "9", "--trusted-proxy", "unix"],
    "tls": ["--min-tls", "1.3", "--ciphers", "ECDHE+AESGCM", "--alpn", "smtp, lmtp"],
    "limits": ["--max-clients", "100", "--max-clients-per-ip", "9", "--rate-per-ip", "600/m"],
    "times": ["--connect-timeout", "0.25", "--idle-timeout", "60", "--handshake-timeout", "7.5", "--drain-timeout", "0"],
    "times of years": [
        *("--connect-timeout", "1e9", "--idle-timeout", "2592000", "--handshake-timeout", "1e12"),
        *("--drain-timeout", "1e9", "--health-interval", "1e9", "--health-timeout", "1e9"),
    ],
    "somebody": ["--user", "nobody"],
    "a mode": ["--listen", ":4465", "--listen", "unix:tls.sock", "--socket-mode", "0660"],
    "a descriptor beside": ["--listen", "fd:3", "--listen", ":4465", "--metrics", "fd:metrics"],
    "observation": ["--metrics", ":9465", "--log-format", "json", "--log-level", "error"],
}


USER_TIMEOUT = 'tcp-ut "${FUMI_NODE_TCP_USER_TIMEOUT-25s}"'
BIND = 'v6only tcp-ut "${FUMI_TCP_USER_TIMEOUT-30s}"'


@pytest.mark.parametrize("flags", HAPROXY.values(), ids=HAPROXY)
def test_haproxy_accepts_what_is_emitted_and_finds_nothing_to_warn_of(
    flags: list[str], programs: Programs, emit: Emit, both: Path
) -> None:
    accepted(programs, emit("haproxy", "--cert", both, "--backend", "127.0.0.1:2525", *flags))


@pytest.mark.parametrize("version", ["v2", "v1", "off"])
def test_backends_over_tls_are_verified_and_get_the_header_inside_tls(
    programs: Programs, emit: Emit, both: Path, certificate: CertificateFiles, version: str
) -> None:
    ca, key = certificate
    text = emit(
        "haproxy", "--cert", both, "--backend", "127.0.0.1:2525", "--backend", "tls:localhost:2465", "--backend-ca", ca,
        "--backend-cert", ca, "--backend-key", key, "--proxy-protocol", version,
    )  # fmt: skip
    assert f"cat {ca} {key} > {ca}.both" in notes(text)
    Path(f"{ca}.both").write_bytes(both.read_bytes())
    accepted(programs, text)
    verified = f'ssl verify required ca-file "{ca}" verifyhost "localhost" sni str("localhost")'
    if version == "off":
        whole = (
            f'server core2 "localhost:2465" {USER_TIMEOUT} {verified} check-sni "localhost" crt "{ca}.both" ssl-min-ver TLSv1.2'
        )
        assert whole in settings(text)
    else:
        assert f'server core2 "abns@fumi-core2" {USER_TIMEOUT}' in settings(text)
        assert f'server core2 "localhost:2465" {USER_TIMEOUT} {verified} crt "{ca}.both" ssl-min-ver TLSv1.2' in settings(text)
        assert 'bind "abns@fumi-core2"' in settings(text)


def test_what_haproxy_cannot_verify_is_noted(programs: Programs, emit: Emit, both: Path) -> None:
    """It compares DNS names only."""
    flags = ("--cert", both, "--backend", "tls:127.0.0.1:2465", "--backend-ca", both)
    text = emit("haproxy", *flags)
    accepted(programs, text)
    assert "127.0.0.1: HAProxy compares DNS names only" in notes(text)
    assert 'verifyhost "127.0.0.1"' in text
    text = emit("haproxy", *flags, "--backend-name", "core.example.org")
    assert "DNS names only" not in text
    assert 'verifyhost "core.example.org" sni str("core.example.org")' in text


def test_stunnel_has_tls_on_one_side_only(emit: Emit, both: Path) -> None:
    said = emit("stunnel", "--cert", both, "--backend", "tls:127.0.0.1:2465", status=2)
    assert "tls:127.0.0.1:2465: a service of stunnel has TLS on one side only" in said


def test_every_setting_is_where_haproxy_has_it(emit: Emit, both: Path, client_certificate: ClientCertificate) -> None:
    text = emit(
        "haproxy", "--cert", both, "--cert", both, "--backend", "127.0.0.1:2525", "--backend", "unix:/run/core.sock",
        "--listen", "127.0.0.1:4465", "--listen", ":4466", "--client-ca", client_certificate.ca, "--client-cert", "required",
        "--alpn", "smtp", "--balance", "roundrobin", "--health-interval", "2", "--max-clients", "100",
        "--max-clients-per-ip", "9", "--rate-per-ip", "10/s", "--connect-timeout", "0.25", "--idle-timeout", "60",
        "--drain-timeout", "5", "--min-tls", "1.3", "--metrics", "127.0.0.1:9465",
        "--log-level", "warning", "--ciphers", "ECDHE+AESGCM",
    )  # fmt: skip
    bind = f'"127.0.0.1:4465,:4466,[::]:4466" {BIND} ssl crt "{both}" crt "{both}" ca-file "{client_certificate.ca}"'
    full = "send-proxy-v2-ssl-cn proxy-v2-options ssl,cert-cn,ssl-cipher,authority,crc32c,unique-id"
    expected = [
        f'bind {bind} verify required alpn "smtp"', 'balance "roundrobin"',
        'server core1 "127.0.0.1:2525" ' + USER_TIMEOUT, 'server core2 "unix@/run/core.sock" ' + USER_TIMEOUT,
        f'default-server {full} check inter "2000ms"', 'maxconn "100"', 'hard-stop-after "5000ms"', 'timeout connect "250ms"',
        'timeout client "60000ms"', 'timeout server "60000ms"', 'ssl-default-bind-options ssl-min-ver "TLSv1.3"',
        'ssl-default-bind-ciphers "ECDHE+AESGCM"', 'bind "127.0.0.1:9465" v6only',
        'tcp-request connection reject if { sc0_conn_cur(clients) gt "9" }',
        'tcp-request connection reject if { sc0_conn_rate(clients) gt "10" }',
        "stick-table type ipv6 size 100k expire 1h store conn_cur,conn_rate(1s)",
    ]  # fmt: skip
    assert [line for line in expected if line not in settings(text)] == []
    assert 'local0 "warning"' in text


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
def test_a_time_that_is_too_long_is_shortened_with_a_note(program: str, emit: Emit, both: Path) -> None:
    text = emit(program, "--cert", both, "--backend", ":2525", "--idle-timeout", "2592000", "--connect-timeout", "2147483")
    said = notes(text, "#" if program == "haproxy" else ";")
    assert (
        f"--idle-timeout: 2147483 seconds, the longest that {'HAProxy' if program == 'haproxy' else 'stunnel'} accepts." in said
    )
    assert "--connect-timeout" not in said


def test_limits_without_a_flag_are_not_emitted(emit: Emit, both: Path) -> None:
    text = emit("haproxy", "--cert", both, "--backend", ":2525")
    assert not re.search("maxconn|stick-table|sc0|prometheus", text)
    assert 'server core1 "127.0.0.1:2525" ' + USER_TIMEOUT in settings(text)
    # A reload leaves sessions alone as long as in the template, not for fumi-edge's 30 seconds.
    assert 'hard-stop-after "15m"' in [re.sub(r"\$\{\w+-(\w+)\}", r"\1", line) for line in settings(text)]


def test_behind_a_balancer_only_trusted_addresses_may_connect(emit: Emit, both: Path) -> None:
    said = [settings(emit("haproxy", "--cert", both, "--accept-proxy", *more)) for more in ((), ("--trusted-proxy", "192.0.2.7"))]
    assert "tcp-request connection reject if { src -m found } !{ src 127.0.0.0/8 ::1/128 }" in said[0]
    assert "tcp-request connection reject if !{ src 192.0.2.7 }" in said[1]


def test_a_key_in_a_file_of_its_own_needs_the_link_in_the_note(
    programs: Programs, emit: Emit, certificate: CertificateFiles
) -> None:
    directory = programs.directory / "a $ directory"
    directory.mkdir()
    cert, key = directory / "it's.pem", directory / "key.pem"
    cert.write_bytes(certificate[0].read_bytes())
    key.write_bytes(certificate[1].read_bytes())
    text = emit("haproxy", "--cert", cert, "--key", key, "--backend", ":2525")
    programs.run("sh", "-euc", "\n".join(re.findall(r"^#     (ln -s .*)$", text, re.MULTILINE)))
    accepted(programs, text)


def test_a_directory_is_what_is_in_it_now(programs: Programs, emit: Emit, certificate: CertificateFiles) -> None:
    live = programs.directory / "letsencrypt" / "live"
    for name in ("b.example", "a.example"):
        (live / name).mkdir(parents=True)
        (live / name / "fullchain.pem").write_bytes(certificate[0].read_bytes())
        (live / name / "privkey.pem").write_bytes(certificate[1].read_bytes())
    text = emit("haproxy", "--cert", live.parent, "--backend", ":2525")
    for command in re.findall(r"^#     (ln -s .*)$", text, re.MULTILINE):
        subprocess.run(shlex.split(command), check=True)
    accepted(programs, text)
    assert re.findall(r'crt "[^"]*/([^/]*)/fullchain.pem"', text) == ["a.example", "b.example"]


def test_the_user_is_carried_over_with_its_group(emit: Emit, both: Path) -> None:
    """A configuration may be for another machine, with users of its own; root it is for nobody."""
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    for user, its in (("nobody", group), ("no-such-user", "no-such-user")):
        flags = ("--cert", both, "--backend", ":2525", "--user", user)
        haproxy, stunnel = emit("haproxy", *flags), emit("stunnel", *flags)
        assert [line for line in settings(haproxy) if line.startswith(("user", "group"))] == [
            f'user "{user}"', f'group "${{FUMI_GROUP-{its}}}"'
        ]  # fmt: skip
        assert [line for line in settings(stunnel) if line.startswith("set")] == [f"setuid = {user}", f"setgid = {its}"]
        assert "--user" not in notes(haproxy) + notes(stunnel, ";")


def test_descriptors_are_omitted_with_a_note(emit: Emit, both: Path) -> None:
    flags = ("--cert", both, "--backend", ":2525", "--listen", "fd:3", "--listen", ":4465", "--metrics", "fd:metrics")
    text = emit("haproxy", *flags)
    assert "fd:3: omitted" in notes(text)
    assert "fd:metrics: omitted" in notes(text)
    assert "fd@" not in text


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
def test_a_switch_that_is_off_is_not_lost(program: str, emit: Emit, both: Path) -> None:
    config = both.with_name("edge.toml")
    config.write_text("require-tls = true\naccept-proxy = true\nhide-starttls = true\n")
    names = ("REQUIRE_TLS", "ACCEPT_PROXY", "HIDE_STARTTLS")
    off = {f"FUMI_EDGE_{name}": "false" for name in names}
    text = emit(program, "--cert", both, "--backend", ":2525", "--config", config, **off)
    assert not re.search("--require-tls|--hide-starttls|--accept-proxy", notes(text, "#" if program == "haproxy" else ";"))


TABLES = """
[edge]
cert = "{both}"
backend = "127.0.0.1:2525"

[[edge.listener]]
address = ":2587"
mode = "starttls"
require-tls = true

[[edge.listener]]
address = "127.0.0.1:4465"
mode = "tls"
idle-timeout = 60
max-clients-per-ip = 9

[[edge.listener]]
address = "127.0.0.1:4466"
mode = "tls"
min-tls = "1.3"
ciphers = "ECDHE+AESGCM"
handshake-timeout = 3
max-clients-per-ip = 5
accept-proxy = true
client-ca = "{ca}"
backend = ["127.0.0.1:2526", "unix:/run/core.sock"]
balance = "first"
"""


@pytest.fixture
def tables(programs: Programs, both: Path, client_certificate: ClientCertificate) -> Path:
    path = programs.directory / "edge.toml"
    path.write_text(TABLES.format(both=both, ca=client_certificate.ca))
    return path


def test_each_listener_for_tls_with_a_table_of_its_own_is_a_section_of_haproxy(
    programs: Programs, emit: Emit, both: Path, tables: Path, client_certificate: ClientCertificate
) -> None:
    text = emit("haproxy", "--config", tables)
    accepted(programs, text)
    assert "[[edge.listener]] :2587: HAProxy does not support STARTTLS for SMTP" in notes(text)
    general, first, second = re.split(r"^listen .*\n", text, flags=re.MULTILINE)
    bind = f'bind "127.0.0.1:4466" {BIND} ssl crt "{both}" ca-file "{client_certificate.ca}" verify optional accept-proxy'
    assert f'{bind} ssl-min-ver "TLSv1.3" ciphers "ECDHE+AESGCM"' in settings(second)
    assert {'ssl-default-bind-options ssl-min-ver "TLSv1.2"', 'timeout client "900000ms"'} <= set(settings(general))
    own = {'timeout client "60000ms"', 'tcp-request connection reject if { sc0_conn_cur(clients) gt "9" }'}
    assert {*own, 'server core1 "127.0.0.1:2525" ' + USER_TIMEOUT} <= set(settings(first))
    own = {'timeout client-hs "3000ms"', 'tcp-request session reject if { sc0_conn_cur(clients-2) gt "5" }'}
    assert {*own, 'server core2 "unix@/run/core.sock" ' + USER_TIMEOUT, 'balance "first"'} <= set(settings(second))


def test_each_listener_for_tls_with_a_table_of_its_own_is_a_service_of_stunnel(emit: Emit, tables: Path) -> None:
    text = emit("stunnel", "--config", tables)
    assert "[[edge.listener]] :2587: stunnel cannot combine STARTTLS" in notes(text, ";")
    first, second = (settings(each) for each in re.split(r"^\[smtps.*\n", text, flags=re.MULTILINE)[1:])
    assert {"accept = 127.0.0.1:4465", "connect = 127.0.0.1:2525", "TIMEOUTidle = 60"} <= set(first)
    own = {"sslVersionMin = TLSv1.3", "ciphers = ECDHE+AESGCM", "TIMEOUTbusy = 3", "failover = prio"}
    assert {"accept = 127.0.0.1:4466", *own} <= set(second)


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
def test_tables_for_starttls_alone_have_no_equivalent(program: str, emit: Emit, tables: Path) -> None:
    tables.write_text(tables.read_text().replace('mode = "tls"', 'mode = "starttls"'))
    assert "only fumi-edge supports STARTTLS" in emit(program, "--config", tables, status=2)


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
def test_without_a_header_the_core_has_to_know(program: str, emit: Emit, both: Path) -> None:
    text = emit(program, "--cert", both, "--backend", ":2525", "--proxy-protocol", "off")
    assert "--proxy-protocol off: fumi-core needs it too" in notes(text, "#" if program == "haproxy" else ";")


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
def test_settings_without_a_flag_keep_the_values_of_the_file(program: str, emit: Emit) -> None:
    text = emit(program)
    assert "/etc/fumi/fumi.pem" in text
    assert "127.0.0.1:2525" in text
    for missing in ("--cert: no certificate was named", "--backend: no backend was named"):
        assert missing in notes(text, "#" if program == "haproxy" else ";")


REWORDED = "core2 backend clients stick-table track-sc0 smtpchk ssl {FUMI_MAX_CLIENTS-1} setuid = nobody [smtps]"
WITH_REWORDED_COMMENTS: list[list[str]] = [
    [],
    ["--max-clients", "9", "--metrics", ":9465", "--backend", ":2526"],
    ["--proxy-protocol", "off", "--health-interval", "0", "--user", "nobody"],
]


@pytest.mark.parametrize("flags", WITH_REWORDED_COMMENTS, ids=" ".join)
@pytest.mark.parametrize(("program", "file"), [("haproxy", "haproxy.cfg"), ("stunnel", "stunnel.conf")])
def test_a_reworded_comment_in_a_template_changes_no_setting(
    program: str, file: str, flags: list[str], both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emitted() -> list[str]:
        done = CliRunner().invoke(main, ["--emit", program, "--cert", str(both), "--backend", ":2525", *flags])
        assert done.exit_code == 0, done.output
        return settings(done.output)

    before = emitted()
    text = (files("fumi_edge") / "templates" / file).read_text()
    text = re.sub(r"^( *)([#;])(?!:).*", rf"\1\2 {REWORDED}", text, flags=re.MULTILINE)
    if program == "haproxy":
        text = re.sub(r"^([^#\n]*[^#\s])$", rf"\1  # {REWORDED}", text, flags=re.MULTILINE)
    assert text.count(REWORDED) > 5
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / file).write_text(text)
    monkeypatch.setattr(template, "files", lambda package: tmp_path)
    assert emitted() == before


@pytest.mark.parametrize(("program", "unix"), [("haproxy", False), ("haproxy", True), ("stunnel", False)])
def test_mail_comes_through_what_was_emitted(
    program: str,
    unix: bool,
    programs: Programs,
    emit: Emit,
    fumi_core: StartFumiCore,
    both: Path,
    certificate: CertificateFiles,
    client_certificate: ClientCertificate,
) -> None:
    local = f"unix:{programs.directory}/core.sock"
    core, _ = fumi_core("--listen", local, *(["--assume-tls"] if program == "stunnel" else []))
    port, backend = free_port(), local if unix else f"127.0.0.1:{core}"
    path = programs.directory / "emitted"
    # From the environment, as flags may come.
    settings = {"FUMI_EDGE_LISTEN": f"127.0.0.1:{port}", "FUMI_EDGE_BACKEND": backend, "FUMI_EDGE_CERT": str(both)}
    path.write_text(emit(program, "--client-ca", client_certificate.ca, "--client-cert", "required", **settings))
    programs.start(program, *(["-f"] if program == "haproxy" else []), path, port=port)
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with (
        pytest.raises((ssl.SSLError, OSError, smtplib.SMTPServerDisconnected)),
        smtplib.SMTP_SSL("localhost", port, context=context),
    ):
        pass
    context.load_cert_chain(client_certificate.cert, client_certificate.key)
    with smtplib.SMTP_SSL("localhost", port, context=context) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")
    assert len(list((programs.directory / "core" / "new").iterdir())) == 1


STUNNEL = {
    "nothing but what is needed": [],
    "backends": ["--backend", "[::1]:2526", "--backend", "unix:/run/core.sock", "--balance", "first"],
    "no header": ["--proxy-protocol", "off", "--listen", "unix:tls.sock"],
    "tls": ["--min-tls", "1.3", "--ciphers", "ECDHE+AESGCM"],
    "times of years": ["--connect-timeout", "1e9", "--idle-timeout", "2592000", "--handshake-timeout", "1e12"],
    "times": ["--connect-timeout", "0.25", "--idle-timeout", "60", "--handshake-timeout", "7.5"],
    "logs": ["--log-level", "error"],
    "somebody": ["--user", "nobody"],
    "what it has not": ["--metrics", ":9465", "--alpn", "smtp", "--max-clients", "9", "--starttls-listen", ":2587"],
}


@pytest.mark.parametrize("flags", STUNNEL.values(), ids=STUNNEL)
def test_stunnel_starts_with_what_is_emitted(
    flags: list[str], programs: Programs, emit: Emit, certificate: CertificateFiles
) -> None:
    first, last = free_port(), free_port()
    listeners = ["--listen", f"127.0.0.1:{first}", "--listen", f"127.0.0.1:{last}"]
    cert = ["--cert", certificate[0], "--key", certificate[1]]
    path = programs.directory / "stunnel.conf"
    path.write_text(emit("stunnel", *cert, "--backend", "127.0.0.1:2525", *flags, *listeners))
    programs.start("stunnel", path, port=last)
    # It opens its ports before it says a word, and with the level error it says none.
    until(lambda: "stunnel" in (programs.directory / "log").read_text() or "error" in flags, "its first words")


def test_every_setting_is_where_stunnel_has_it(
    emit: Emit, certificate: CertificateFiles, client_certificate: ClientCertificate
) -> None:
    text = emit(
        "stunnel", "--cert", certificate[0], "--key", certificate[1], "--backend", "127.0.0.1:2525", "--backend", "[::1]:2526",
        "--listen", "[::1]:4465", "--listen", ":4466", "--client-ca", client_certificate.ca, "--client-cert", "optional",
        "--balance", "roundrobin", "--connect-timeout", "0.25", "--idle-timeout", "60", "--handshake-timeout", "7.5",
        "--min-tls", "1.3", "--ciphers", "ECDHE+AESGCM", "--log-level", "warning",
    )  # fmt: skip
    said = settings(text)
    for line in ("TIMEOUTconnect = 1", "TIMEOUTidle = 60", "TIMEOUTbusy = 8", "sslVersionMin = TLSv1.3", "debug = warning"):
        assert said.count(line) == 1
    service = [
        "connect = 127.0.0.1:2525", "connect = ::1:2526", "failover = rr", f"cert = {certificate[0]}", f"key = {certificate[1]}",
        "protocol = proxy", f"CAfile = {client_certificate.ca}", "verifyChain = yes", "requireCert = no",
    ]  # fmt: skip
    begin = said.index("[smtps]")
    assert said[begin:] == ["[smtps]", "accept = ::1:4465", *service, "[smtps-2]", "accept = :::4466", *service]


LOST = {
    "haproxy": ["--starttls-listen 127.0.0.1:2587", "--log-format", "ln -s", "421"],
    "stunnel": [
        *("--starttls-listen 127.0.0.1:2587", "--assume-tls", "--balance leastconn", "--accept-proxy", "--alpn", "--metrics"),
        *("--max-clients:", "--max-clients-per-ip", "--rate-per-ip", "--health-interval", "--drain-timeout", "unix:tls.sock"),
    ],
}


@pytest.mark.parametrize("program", LOST)
def test_differences_of_the_other_program_are_noted_at_the_top(program: str, emit: Emit, certificate: CertificateFiles) -> None:
    text = emit(
        program, "--cert", certificate[0], "--key", certificate[1], "--backend", ":2525", "--backend", ":2526",
        "--listen", "127.0.0.1:4465", "--listen", "unix:tls.sock", "--starttls-listen", "127.0.0.1:2587", "--alpn", "smtp",
        "--accept-proxy", "--metrics", ":9465", "--max-clients", "9", "--max-clients-per-ip", "2", "--rate-per-ip", "1/s",
        "--health-interval", "1", "--drain-timeout", "1", "--log-format", "json",
    )  # fmt: skip
    said = notes(text, "#" if program == "haproxy" else ";")
    assert [word for word in LOST[program] if word not in said] == []
    if program == "haproxy":
        assert "--metrics" not in said


BAD = {
    "starttls alone": (["--starttls-listen", ":587"], "name a --listen for implicit TLS"),
    "dev": (["--dev"], "name a certificate and a backend"),
    "a line end": (["--cert", "a\nuser = root", "--backend", ":2525"], "--cert contains a line end"),
    "keys": (["--cert", "a.pem", "--key", "a.key", "--key", "b.key"], "a.pem"),
    "ciphers": (["--ciphers", "NOPE"], "--ciphers: 'NOPE' selects no TLS 1.2 cipher"),
    "a descriptor": (["--listen", "fd:smtps"], "name HOST:PORT"),
    "a backend that is none": (["--backend", "fd:3"], "fd:3 is not a backend"),
    "a backend over TLS without a host": (["--backend", "tls::465"], "names no host"),
    "a program nobody knows": (["--emit", "nginx"], "nginx"),
}


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_settings_that_cannot_be_emitted_are_an_error_of_one_line_and_status_2(
    program: str, flags: list[str], message: str, emit: Emit
) -> None:
    said = emit(program, *flags, status=2)
    assert message in said
    assert len(said.splitlines()) == 1


def test_stunnel_without_a_listener_that_it_could_have_is_an_error(emit: Emit) -> None:
    assert "HOST:PORT" in emit("stunnel", "--listen", "unix:tls.sock", status=2)
