"""Every command of the README does what the README says, in the order in which it stands there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.certificates import CertificateFiles
from tests.support.ports import alone, free_port
from tests.support.programs import Programs, listening
from tests.support.readme import PATH, ROOT, blocks, other_ports, sh
from tests.support.starter import BIN
from tests.support.waiting import until

BLOCKS = blocks((ROOT / "README.md").read_text())
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
DEV = (4650, 5870, 9465)
"""Where fumi-edge --dev listens."""
RUN, SWAKS, INSTALL, COMPLETION, CORE, EDGE, USERS, SUBMIT_CORE, SUBMIT_EDGE, CAT, HAPROXY, STUNNEL_CORE, STUNNEL, MINE, TEST = (
    SHELL
)


def test_the_first_command_runs_and_the_next_ones_send_mail(programs: Programs) -> None:
    # A copy, as a clone would be: without .venv, and so that ./maildir is made there.
    checkout = programs.directory / "fumi"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(files).split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    with alone("dev"):
        until(lambda: not any(map(listening, DEV)), f"nobody else listening on {DEV}", patience=120)
        dev = programs.start("sh", "-c", f"cd {checkout} && exec {RUN}")
        # A virtual environment takes its time, and what goes into it comes from elsewhere.
        until(lambda: listening(5870) or dev.poll() is not None, "fumi-edge --dev", patience=240)
        log = (programs.directory / "log").read_text()
        assert dev.poll() is None, log
        said = [line.removeprefix("ops/run: ") for line in log.splitlines() if line.startswith("ops/run: ")]
        assert [" ".join(line.split()[:2]) for line in said] == ["creating a", "installing Fumi", "starting fumi-edge"]
        for command in SWAKS.splitlines():
            assert " 250 2.0.0 Ok: queued as " in sh(command, checkout)
        assert len(list((checkout / "maildir" / "new").iterdir())) == 2
        assert programs.stop(dev, signal.SIGINT) == 0


def test_the_installation_installs_both_programs(tmp_path: Path) -> None:
    text = f"export HOME={tmp_path}\n" + INSTALL.replace("pip install .", f"pip install --quiet {ROOT}")
    text += f"{tmp_path}/fumi/bin/fumi-core --version\n{tmp_path}/fumi/bin/fumi-edge --version\n"
    text += "".join(f"{tmp_path}/fumi/bin/fumi-edge --emit {program}\n" for program in ("haproxy", "stunnel"))
    # Not from the checkout: what is not in the package is not there.
    said = sh(text, tmp_path)
    assert said.count(", version ") == 2
    pages = tmp_path / "fumi" / "share" / "man" / "man1"
    assert sorted(each.name for each in pages.iterdir()) == ["fumi-core.1", "fumi-edge.1"]
    assert "listen smtps" in said
    assert "[smtps]" in said


def test_a_shell_completes_flags_and_files(tmp_path: Path) -> None:
    # compopt works in a completion that a key has begun, and only there.
    stub = "compopt() { echo compopt $*; }\n"

    def completed(words: str) -> str:
        program, number = words.split()[0], len(words.split()) - 1
        asking = f"COMP_WORDS=({words}); COMP_CWORD={number}; _{program.replace('-', '_')}_completion {program}"
        command = ["bash", "-c", f'{COMPLETION}{stub}{asking}; echo "${{COMPREPLY[*]}}"']
        environment = {**os.environ, "PATH": PATH}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    assert completed("fumi-core --use") == "--users"
    assert completed("fumi-core --users ''") == "compopt -o default"
    assert completed("fumi-edge --backend-c") == "--backend-ca --backend-cert"
    assert completed("fumi-edge --cert ''") == "compopt -o default"


def test_the_two_programs_run_and_the_file_says_the_same(programs: Programs, certificate: CertificateFiles) -> None:
    for path in certificate:
        (programs.directory / path.name).write_bytes(path.read_bytes())
    ports = {port: free_port() for port in ("2525", "9525", "25", "9465", "587")}
    core, edge = other_ports(CORE, ports), other_ports(EDGE, ports)
    programs.start("sh", "-c", f"PATH={PATH} exec {core.strip()}", port=ports["2525"])
    programs.start("sh", "-c", f"PATH={PATH} exec {edge.strip()}", port=ports["9465"])
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with smtplib.SMTP("localhost", ports["25"]) as smtp:
        smtp.starttls(context=context)
        smtp.sendmail("a@example.com", ["b@example.org"], "Subject: hi\r\n\r\nhi\r\n")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            smtp.sendmail("a@example.com", ["b@elsewhere.example"], "Subject: hi\r\n\r\nhi\r\n")
    assert len(list((programs.directory / "inbox" / "new").iterdir())) == 1
    (config,) = (text for kind, text in BLOCKS if kind == "toml")
    others = {port: free_port() for port in ("25", "587")} | {"2525": ports["2525"]}
    (programs.directory / "edge.toml").write_text(other_ports(config, others))
    others["2525"] = free_port()
    (programs.directory / "core.toml").write_text(other_ports(config, others))
    for program in ("core", "edge"):
        sh(f"fumi-{program} --config {program}.toml --check", programs.directory)


def test_only_users_can_submit_mail(programs: Programs, certificate: CertificateFiles) -> None:
    for path in certificate:
        (programs.directory / path.name).write_bytes(path.read_bytes())
    said = programs.run("sh", "-euc", USERS, given=b"secret\n", environment={"PATH": PATH})
    assert (said, stat.S_IMODE((programs.directory / "users").stat().st_mode)) == ("", 0o600)
    ports = {port: free_port() for port in ("2587", "10025", "465", "587")}
    core, edge = other_ports(SUBMIT_CORE, ports), other_ports(SUBMIT_EDGE, ports)
    queue = ["--proxy-protocol", "off", "--deliver", "maildir:./queue"]
    programs.start(BIN / "fumi-core", "--listen", f"127.0.0.1:{ports['10025']}", *queue, port=ports["10025"], log="queue.log")
    programs.start("sh", "-c", f"PATH={PATH} exec {core.strip()}", port=ports["2587"])
    programs.start("sh", "-c", f"PATH={PATH} exec {edge.strip()}", port=ports["587"])
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with smtplib.SMTP_SSL("localhost", ports["465"], context=context) as smtp:
        with pytest.raises(smtplib.SMTPSenderRefused):
            smtp.sendmail("joe@example.org", ["b@elsewhere.example"], "Subject: hi\r\n\r\nhi\r\n")
        smtp.login("joe", "secret")
        smtp.sendmail("joe@example.org", ["b@elsewhere.example"], "Subject: hi\r\n\r\nhi\r\n")
    with smtplib.SMTP("localhost", ports["587"]) as smtp:
        smtp.ehlo()
        assert smtp.mail("joe@example.org")[0] == 530
        smtp.starttls(context=context)
        smtp.login("joe", "secret")
        smtp.sendmail("joe@example.org", ["b@elsewhere.example"], "Subject: hi\r\n\r\nhi\r\n")
    assert len(list((programs.directory / "queue" / "new").iterdir())) == 2


def test_the_certificates_that_it_names_are_taken(programs: Programs, certificate: CertificateFiles) -> None:
    text = (ROOT / "README.md").read_text()
    (make,) = re.findall(r"`(ops/certs/dev-ca [^`]+)`", text)
    (dev, letsencrypt) = re.findall(r"`(--cert [/a-z]\S+)`", text)[::-1]
    (programs.directory / "ops").symlink_to(ROOT / "ops")
    sh(make, programs.directory)
    live = programs.directory / "etc" / "letsencrypt" / "live" / "localhost"
    live.mkdir(parents=True)
    for path, name in zip(certificate, ("fullchain.pem", "privkey.pem"), strict=True):
        assert f"`{name}`" in text
        (live / name).write_bytes(path.read_bytes())
    for flags in (dev, letsencrypt.replace("/etc", "etc")):
        port = free_port()
        command = f"PATH={PATH} exec fumi-edge {flags} --backend 127.0.0.1:1 --listen 127.0.0.1:{port}"
        programs.start("sh", "-c", command, port=port)


@pytest.mark.parametrize("other", [HAPROXY, STUNNEL], ids=["haproxy", "stunnel"])
def test_another_program_terminates_tls(programs: Programs, certificate: CertificateFiles, other: str) -> None:
    for path in certificate:
        (programs.directory / path.name).write_bytes(path.read_bytes())
    for name in ("haproxy", "stunnel"):
        (programs.directory / name).symlink_to(ROOT / name)
    sh(CAT, programs.directory)
    core, tls, metrics = (free_port() for _ in range(3))
    given = f"FUMI_BACKEND=127.0.0.1:{core} FUMI_LISTEN=127.0.0.1:{tls} FUMI_METRICS=127.0.0.1:{metrics}"
    # With HAProxy the core is the one that stands further up.
    serve = other_ports(STUNNEL_CORE if other is STUNNEL else CORE, {"2525": core, "9525": free_port()})
    programs.start("sh", "-c", f"PATH={PATH} exec {serve.strip()}", port=core)
    assignment, _, command = other.strip().partition(" ")
    programs.start("sh", "-c", f"PATH={PATH}; export {assignment} {given}; exec {command}", port=tls)
    with smtplib.SMTP_SSL("localhost", tls, context=ssl.create_default_context(cafile=str(certificate[0]))) as smtp:
        smtp.sendmail("a@example.com", ["b@example.org"], "Subject: hi\r\n\r\nhi\r\n")
    assert len(list((programs.directory / "inbox" / "new").iterdir())) == 1


def test_the_server_of_ones_own_runs(programs: Programs) -> None:
    (source,) = (text for kind, text in BLOCKS if kind == "python")
    (programs.directory / "mine.py").write_text(source)
    port = free_port()
    programs.start("sh", "-c", f"PATH={PATH} PYTHONUNBUFFERED=1 exec {MINE.strip()} --listen 127.0.0.1:{port}", port=port)
    with smtplib.SMTP() as smtp:
        smtp._get_socket = _with_header(smtp._get_socket)  # type: ignore[attr-defined]
        smtp.connect("127.0.0.1", port)
        smtp.ehlo()
        smtp.mail("a@example.com")
        assert smtp.rcpt("b@elsewhere.example")[0] == 550
        assert smtp.rcpt("b@example.org")[0] == 250
        assert smtp.data("hi\r\n")[0] == 250
    until(lambda: "192.0.2.1 None b'hi" in (programs.directory / "log").read_text(), "what it prints")


def _with_header(connect: Callable[..., socket.socket]) -> Callable[..., socket.socket]:
    def connected(*arguments: object) -> socket.socket:
        sock = connect(*arguments)
        sock.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
        return sock

    return connected


def test_the_test_command_is_the_one_of_continuous_integration() -> None:
    assert TEST.strip() in (ROOT / ".ci" / "run").read_text().splitlines()
