"""--emit, with values that have a meaning to HAProxy or stunnel: they mean the same there, or are an error of one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fumi_edge.cli import main

BACKEND = ["--backend", "127.0.0.1:2525"]


def refusal(program: str, *flags: str) -> str:
    done = CliRunner().invoke(main, ["--emit", program, *flags])
    assert done.exit_code == 2, done.output
    assert len(done.output.splitlines()) == 1
    return done.output


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cert", "a\rb.pem", *BACKEND], "--cert contains a line end"),
        (["--ciphers", "", *BACKEND], "--ciphers: '' selects no TLS 1.2 cipher"),
        (["--alpn", "x" * 256, *BACKEND], "--alpn: the name of a protocol must have 1 to 255 ASCII characters"),
        (["--backend", "tls:a.example:25", "--backend-name", "a,b"], "--backend-name: 'a,b' is not a host name"),
        (["--backend", "tls:a b:25"], "--backend: 'a b' is not a host name"),
    ],
)
def test_what_fumi_edge_rejects_is_rejected(program: str, flags: list[str], message: str) -> None:
    assert message in refusal(program, *flags)


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
@pytest.mark.parametrize("end", ["\n", "\r"])
def test_the_name_of_a_file_in_a_directory_is_no_line_of_the_configuration(program: str, end: str, tmp_path: Path) -> None:
    (tmp_path / f"a{end}user root.pem").touch()
    assert "contains a line end" in refusal(program, "--cert", str(tmp_path), *BACKEND)


@pytest.mark.parametrize("program", ["haproxy", "stunnel"])
@pytest.mark.parametrize("mode", ["tls", "starttls"])
def test_the_address_of_a_table_is_no_line_of_the_configuration(program: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / "fumi.toml").write_text(
        f'[[edge.listener]]\naddress = "unix:a\\nuser root"\nmode = "{mode}"\n[[edge.listener]]\naddress = ":4465"\n'
    )
    assert "contains a line end" in refusal(program, "--config", str(tmp_path / "fumi.toml"), "--proxy-protocol", "off", *BACKEND)


@pytest.mark.parametrize(
    ("flag", "address"),
    [
        ("--listen", "unix:a$HOME"),  # HAProxy takes it for a variable, also between quotes
        ("--backend", "unix:a${HOME}b"),
        ("--metrics", "unix:a$b"),
        ("--listen", "unix:a,b"),  # and this for two addresses
        ("--metrics", "unix:a,b"),
        ("--listen", "unix:" + "x" * 96),
    ],
)
def test_a_socket_that_haproxy_cannot_open_is_an_error(flag: str, address: str) -> None:
    assert f"--emit haproxy: {address}: " in refusal("haproxy", *BACKEND, flag, address)


@pytest.mark.parametrize("flag", ["--cert", "--key", "--client-ca", "--backend"])
@pytest.mark.parametrize("path", ["/a ", "/a\t"])
def test_a_path_whose_end_stunnel_would_leave_out_is_an_error(flag: str, path: str) -> None:
    value = f"unix:{path}" if flag == "--backend" else path
    cert = [] if flag == "--cert" else ["--cert", "c.pem"]
    assert f"--emit stunnel: {path!r} begins or ends with white space" in refusal("stunnel", *cert, flag, value)


def test_a_path_that_looks_like_a_variable_of_the_template_stays_a_path() -> None:
    done = CliRunner().invoke(main, ["--emit", "haproxy", "--cert", "a.pem", "--cert", "${FUMI_USER-x}.pem", *BACKEND])
    assert r' crt "a.pem" crt "\${FUMI_USER-x}.pem"' in done.output
