"""The files of stunnel/: stunnel takes them, and mail comes through; with the environment's values by stunnel/run."""

from __future__ import annotations

import grp
import os
import pwd
import re
import signal
import smtplib
import ssl
import stat
import tempfile
from pathlib import Path

import pytest

from tests.interop.starting import ClientCertificate, StartFumiCore, StartStunnel
from tests.support.certificates import CertificateFiles, self_signed
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

DIRECTORY = Path(__file__).parents[2] / "stunnel"
FILES = sorted(path.name for path in DIRECTORY.glob("*.conf"))
README = (DIRECTORY / "README.md").read_text()

REFUSED = (ssl.SSLError, OSError, smtplib.SMTPServerDisconnected)


@pytest.fixture
def trusting(certificate: CertificateFiles) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


def send(port: int, context: ssl.SSLContext) -> None:
    with smtplib.SMTP_SSL("localhost", port, context=context) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")


def stored(programs: Programs, name: str) -> list[Path]:
    new = programs.directory / name / "new"
    return list(new.iterdir()) if new.exists() else []


@pytest.mark.parametrize("name", FILES)
def test_stunnel_reads_the_file_as_it_is_up_to_the_certificate(name: str, programs: Programs) -> None:
    # It has no way to only check; a file that ends at /etc/fumi, which is not here, has had its options read.
    assert not Path("/etc/fumi").exists(), "this test would start the service of this machine"
    said = programs.run("stunnel", DIRECTORY / name, status=1)
    assert "/etc/fumi/fumi.pem" in said
    assert "No such file or directory" in said


def test_the_readme_has_every_file_and_every_variable_with_its_default() -> None:
    assert sorted(set(re.findall(r"`([\w-]+\.conf)`", README))) == FILES
    used: dict[str, str] = {}
    for name in ("implicit-tls.conf", "mutual-tls.conf"):
        used |= dict(re.findall(r"^(\w+) = (.*)$", (DIRECTORY / name).read_text(), re.MULTILINE))
    used |= {"requireCert": {"yes": "required"}[used["requireCert"]], "sslVersionMin": used["sslVersionMin"].removeprefix("TLSv")}
    table = re.findall(r"^\| `(FUMI_\w+)` \| `(\w+)` \| `([^`]*)` \|", README, re.MULTILINE)
    assert {option: used[option] for _, option, _ in table} == {option: default for _, option, default in table}
    listed = re.findall(r"[a-zA-Z]+ [A-Z_]{3,}", "".join(re.findall(r'"(.* [A-Z_]+ ?)"', (DIRECTORY / "run").read_text())))
    assert {f"{option} {variable.removeprefix('FUMI_')}" for variable, option, _ in table} == set(listed)


def test_mail_comes_through_with_the_clients_address(
    programs: Programs, stunnel: StartStunnel, fumi_core: StartFumiCore, trusting: ssl.SSLContext
) -> None:
    core, _ = fumi_core("--assume-tls")
    port = free_port()
    stunnel("implicit-tls.conf", port, LISTEN=f"127.0.0.1:{port}", BACKEND=f"127.0.0.1:{core}")
    with smtplib.SMTP_SSL("localhost", port, context=trusting, source_address=("127.0.0.9", 0)) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")
    (message,) = stored(programs, "core")
    assert re.search(rb"\[127\.0\.0\.9\]\).*\sESMTPS id \S+", message.read_bytes(), re.DOTALL), message.read_bytes()


def test_a_core_is_not_connected_to_before_the_handshake_is_over(
    programs: Programs, stunnel: StartStunnel, fumi_core: StartFumiCore
) -> None:
    core, _ = fumi_core("--assume-tls", "--log-level", "debug")
    port = free_port()
    stunnel("implicit-tls.conf", port, LISTEN=f"127.0.0.1:{port}", BACKEND=f"127.0.0.1:{core}")
    programs.run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0", status=1)
    log = programs.directory / "stunnel.log"
    until(lambda: "Connection reset/closed" in log.read_text(), "the end")
    assert "session" not in (programs.directory / "core.log").read_text()


@pytest.mark.parametrize("cipher", ["AES128-SHA", "AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA"])
def test_old_ciphers_are_refused(cipher: str, programs: Programs, stunnel: StartStunnel) -> None:
    port = free_port()
    stunnel("implicit-tls.conf", port, LISTEN=f"127.0.0.1:{port}")
    said = programs.run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2", "-cipher", cipher, status=1)
    assert "alert handshake failure" in said


def test_tls_1_2_is_refused_when_1_3_is_the_least(programs: Programs, stunnel: StartStunnel) -> None:
    port = free_port()
    stunnel("implicit-tls.conf", port, LISTEN=f"127.0.0.1:{port}", MIN_TLS="1.3")
    said = programs.run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2", status=1)
    assert "alert protocol version" in said


def test_mutual_tls_requires_a_client_certificate_unless_it_is_optional(
    programs: Programs,
    stunnel: StartStunnel,
    fumi_core: StartFumiCore,
    trusting: ssl.SSLContext,
    client_certificate: ClientCertificate,
) -> None:
    core, _ = fumi_core("--assume-tls")
    required, optional = free_port(), free_port()
    for port, variables in ((required, {}), (optional, {"CLIENT_CERT": "optional"})):
        own = {"BACKEND": f"127.0.0.1:{core}", "CLIENT_CA": client_certificate.ca, **variables}
        stunnel("mutual-tls.conf", port, f"{port}.log", LISTEN=f"127.0.0.1:{port}", **own)
    with pytest.raises(REFUSED):
        send(required, trusting)
    send(optional, trusting)
    trusting.load_cert_chain(client_certificate.cert, client_certificate.key)
    send(required, trusting)
    send(optional, trusting)
    assert len(stored(programs, "core")) == 3


def test_with_two_nodes_mail_goes_on_when_one_is_killed(
    programs: Programs, stunnel: StartStunnel, fumi_core: StartFumiCore, trusting: ssl.SSLContext
) -> None:
    nodes = [fumi_core("--assume-tls", name=name) for name in ("one", "two")]
    port = free_port()
    variables = {f"BACKEND_{number}": f"127.0.0.1:{core}" for number, (core, _) in enumerate(nodes, 1)}
    stunnel("two-nodes.conf", port, LISTEN=f"127.0.0.1:{port}", **variables)
    for _ in range(4):
        send(port, trusting)
    assert [len(stored(programs, name)) for name in ("one", "two")] == [2, 2]
    programs.stop(nodes[0][1], 9)
    for _ in range(4):
        send(port, trusting)
    assert [len(stored(programs, name)) for name in ("one", "two")] == [2, 6]


def test_two_services_keep_clients_with_a_certificate_apart(
    programs: Programs,
    stunnel: StartStunnel,
    fumi_core: StartFumiCore,
    trusting: ssl.SSLContext,
    client_certificate: ClientCertificate,
) -> None:
    everybody, relay = free_port(), free_port()
    listeners = {"LISTEN_1": f"127.0.0.1:{everybody}", "LISTEN_2": f"127.0.0.1:{relay}"}
    cores = {f"BACKEND_{n}": f"127.0.0.1:{fumi_core('--assume-tls', name=name)[0]}" for n, name in enumerate(("one", "two"), 1)}
    stunnel("two-services.conf", relay, CLIENT_CA=client_certificate.ca, **listeners, **cores)
    with pytest.raises(REFUSED):
        send(relay, trusting)
    send(everybody, trusting)
    trusting.load_cert_chain(client_certificate.cert, client_certificate.key)
    send(relay, trusting)
    assert [len(stored(programs, name)) for name in ("one", "two")] == [1, 1]


def somebody() -> pwd.struct_passwd:
    """Whom stunnel may become: nobody in particular, or who runs the tests."""
    return pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


def test_it_may_run_as_another_user(programs: Programs, stunnel: StartStunnel) -> None:
    entry = somebody()
    port = free_port()
    own = {"USER": entry.pw_name, "GROUP": grp.getgrgid(entry.pw_gid).gr_name}
    process = stunnel("implicit-tls.conf", port, LISTEN=f"127.0.0.1:{port}", **own)
    status = Path(f"/proc/{process.pid}/status")

    def ids() -> list[str]:
        return re.findall(r"^[UG]id:\t(\d+)", status.read_text(), re.MULTILINE)

    # The ports come first.
    until(lambda: ids() == [str(entry.pw_uid), str(entry.pw_gid)], "its becoming somebody else")


def test_a_reload_takes_a_new_certificate_that_its_user_can_read_and_ends_no_session(
    programs: Programs, fumi_core: StartFumiCore, certificate: CertificateFiles, trusting: ssl.SSLContext
) -> None:
    core, _ = fumi_core("--assume-tls")
    port = free_port()
    entry = somebody()
    # Somewhere that this user can get to, which pytest's directories are not.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        pem, conf = directory / "fumi.pem", directory / "stunnel.conf"

        def renew(text: bytes) -> None:
            pem.write_bytes(text)
            pem.chmod(0o600)
            os.chown(pem, entry.pw_uid, -1)

        renew(certificate[0].with_name("both.pem").read_bytes())
        text = (DIRECTORY / "implicit-tls.conf").read_text()
        group = grp.getgrgid(entry.pw_gid).gr_name
        here = {
            ":::465": f"127.0.0.1:{port}",
            "127.0.0.1:2525": f"127.0.0.1:{core}",
            "/etc/fumi/fumi.pem": str(pem),
            "setuid = root": f"setuid = {entry.pw_name}",
            "setgid = root": f"setgid = {group}",
        }
        for before, after in here.items():
            assert before in text
            text = text.replace(before, after)
        conf.write_text(text)
        process = programs.start("stunnel", conf, port=port)
        with smtplib.SMTP_SSL("localhost", port, context=trusting) as smtp:
            cert, key = self_signed(directory, "new")
            new = cert.read_text()
            renew(new.encode() + key.read_bytes())
            process.send_signal(signal.SIGHUP)

            def renewed() -> bool:
                try:
                    return ssl.get_server_certificate(("127.0.0.1", port)) == new
                except OSError:  # it opens its ports anew
                    return False

            until(renewed, "the new certificate")
            smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")
    assert len(stored(programs, "core")) == 1


# The README's commands

COMMANDS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", COMMANDS[1:], ids=lambda block: re.findall(r"([\w-]+)\.conf", block)[0])
def test_the_commands_of_the_readme_do_what_it_says(
    block: str, programs: Programs, certificate: CertificateFiles, client_certificate: ClientCertificate, trusting: ssl.SSLContext
) -> None:
    for path in certificate:
        (programs.directory / path.name).write_bytes(path.read_bytes())
    (programs.directory / "client-ca.pem").write_bytes(client_certificate.ca.read_bytes())
    (programs.directory / "stunnel").symlink_to(DIRECTORY)
    programs.run("sh", "-euc", COMMANDS[0])
    assert stat.S_IMODE((programs.directory / "fumi.pem").stat().st_mode) == 0o600
    free = {port: free_port() for port in ("465", "10465", *re.findall(r":(\d+)", block))}
    fronts = [free["465"], free["10465"]]
    environment = [f"FUMI_LISTEN_{number}=127.0.0.1:{port}" for number, port in enumerate(fronts, 1)]
    environment += [f"FUMI_BACKEND_{number}=127.0.0.1:{free.get(port)}" for number, port in ((1, "2525"), (2, "2526"))]
    services = len(re.findall("^accept", (DIRECTORY / re.findall(r"\S+\.conf", block)[0]).read_text(), re.MULTILINE))
    search = f"PATH={BIN}:{os.environ['PATH']}"
    for command in re.sub(r"(?<=:)\d+", lambda found: str(free[found[0]]), block.strip()).splitlines():
        ports = re.findall(r"--listen 127\.0\.0\.1:(\d+)", command)
        shell = re.sub(r"^((?:\w+=\S+ )*)", r"\1exec ", command)
        programs.start("env", search, *environment, "sh", "-c", shell, port=int((ports or fronts[services - 1 :])[0]))
    trusting.load_cert_chain(client_certificate.cert, client_certificate.key)
    for port in fronts[:services]:
        send(port, trusting)
    assert len(stored(programs, "inbox")) == services
