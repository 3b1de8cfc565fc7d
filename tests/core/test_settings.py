"""Settings as operators write them, right and wrong: flags, variables, files; for both programs, which read them the same way."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.starter import finished


def run(program: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return finished(program, *arguments, cwd=cwd, env={**os.environ, **environment})


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a program says of a wrong setting."""
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("Error: ")
    return done.stderr


@pytest.mark.parametrize(
    ("program", "text", "wanted"),
    [
        ("fumi-core", "require-tls = 1", "true or false"),
        ("fumi-core", "require-tls = 1.5", "true or false"),
        ("fumi-core", "require-tls = 'yes'", "true or false"),
        ("fumi-core", "max-clients = true", "a whole number, such as 100"),
        ("fumi-core", "max-clients = 20.5", "a whole number, such as 100"),
        ("fumi-core", "max-clients = 12.0", "a whole number, such as 100"),
        ("fumi-core", "size = true", "a number of bytes, such as 25000000"),
        ("fumi-core", "size = '25M'", "a number of bytes"),
        ("fumi-core", "workers = true", 'a number of processes or "auto", such as 4'),
        ("fumi-core", "drain-timeout = true", "a number of seconds, such as 5"),
        ("fumi-core", f"drain-timeout = 1{'0' * 400}", "a number of seconds"),
        ("fumi-core", "users = 5", "a string, in quotes"),
        ("fumi-core", "name = ['a', 'b']", "a string, in quotes"),
        ("fumi-core", "listen = 2525", "a string, in quotes"),
        ("fumi-core", "domain = ['a.example', 5]", "a list of strings"),
        ("fumi-core", "banner = 2020-01-01", "a string, in quotes"),
        ("fumi-core", "listen = ['nonsense']", "is not an address"),
        ("fumi-edge", "cert = true", "a string, in quotes"),
        ("fumi-edge", "idle-timeout = true", "a number of seconds, such as 5"),
        ("fumi-edge", "min-tls = true", "a string, in quotes"),
        ("fumi-edge", "max-clients = 20.5", "a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_file_key_and_what_to_write(
    program: str, text: str, wanted: str, tmp_path: Path
) -> None:
    (tmp_path / "f.toml").write_text(text)
    said = refusal(run(program, "--config", "f.toml", "--check", cwd=tmp_path))
    assert f"f.toml: {text.partition(' =')[0]} = " in said
    assert wanted in said


def test_a_value_of_the_right_type_is_taken(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(
        "listen = '127.0.0.1:0'\nrequire-tls = true\nlmtp = false\nsize = 1000\nmax-clients = '20'\nworkers = 'auto'\n"
        "drain-timeout = 1.5\ndomain = 'a.example'\ndeliver = 'discard:'\nlog-format = 'json'\n"
    )
    done = run("fumi-core", "--config", "f.toml", "--check", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "configuration OK\n", "")


def test_a_version_of_tls_may_be_written_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text("min-tls = 1.3\nidle-timeout = 5")
    assert "no certificate" in refusal(run("fumi-edge", "--config", "f.toml", cwd=tmp_path))


@pytest.mark.parametrize(
    ("program", "keys"),
    [
        ("fumi-core", ("config", "version", "check", "hash-password", "hash_password", "help")),
        ("fumi-edge", ("config", "version", "check", "emit", "dev", "help")),
    ],
)
def test_an_action_is_no_setting_of_a_file(program: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    for key in keys:
        (tmp_path / "f.toml").write_text(f"{key} = true")
        flag = key.replace("_", "-")
        assert f"f.toml: {key} is not a setting; give --{flag} on the command line" in refusal(
            run(program, "--config", "f.toml", cwd=tmp_path)
        )


@pytest.mark.parametrize(
    ("program", "flags", "said"),
    [
        ("fumi-core", ("--drain-timeout", "5s"), "'5s' is not a number of seconds: write one such as 5"),
        ("fumi-core", ("--size", "25M"), "'25M' is not a number of bytes: write one such as 25000000"),
        ("fumi-core", ("--max-clients", "many"), "'many' is not a whole number: write one such as 100"),
        ("fumi-edge", ("--max-clients", "x"), "'x' is not a whole number: write one such as 100"),
        ("fumi-edge", ("--max-clients-per-ip", "2.5"), "'2.5' is not a whole number: write one such as 100"),
        ("fumi-edge", ("--idle-timeout", "nan"), "'nan' is not a number of seconds: write one such as 5"),
        ("fumi-edge", ("--workers", "all"), "'all' is not a number of processes or \"auto\": write one such as 4"),
    ],
)
def test_the_error_for_a_wrong_number_has_an_example(program: str, flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in refusal(run(program, *flags, cwd=tmp_path))


def test_words_stand_in_the_help_as_they_are_written_and_are_taken_in_any_case(tmp_path: Path) -> None:
    text = run("fumi-core", "--help", cwd=tmp_path).stdout
    assert "CIDR|unix" in text
    assert "N|auto" in text
    flags = ("--listen", "127.0.0.1:0", "--deliver", "discard:", "--trusted-proxy", "UNIX", "--workers", "AUTO")
    assert run("fumi-core", *flags, "--check", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("program", "name", "flag"),
    [
        ("fumi-core", "CHECK", "--check"),
        ("fumi-core", "HASH_PASSWORD", "--hash-password"),
        ("fumi-core", "HELP", "--help"),
        ("fumi-edge", "CHECK", "--check"),
        ("fumi-edge", "EMIT", "--emit"),
        ("fumi-edge", "DEV", "--dev"),
        ("fumi-edge", "DEV_MODE", "--dev"),
    ],
)
def test_a_variable_that_names_an_action_is_an_error_and_starts_nothing(
    program: str, name: str, flag: str, tmp_path: Path
) -> None:
    variable = f"{program.upper().replace('-', '_')}_{name}"
    said = refusal(run(program, cwd=tmp_path, **{variable: "1"}))
    assert f"variable {variable}: {flag} is not a setting; give it on the command line" in said


def test_a_variable_for_the_tag_of_an_image_is_left_alone(tmp_path: Path) -> None:
    assert "no certificate" in refusal(run("fumi-edge", cwd=tmp_path, FUMI_EDGE_VERSION="0.2.0"))


def test_a_carriage_return_in_a_variable_is_named(tmp_path: Path) -> None:
    for variable, value in (
        ("FUMI_EDGE_CERT", "cert.pem"),
        ("FUMI_EDGE_MIN_TLS", "1.3"),
        ("FUMI_EDGE_LISTEN", ":465 :25"),
    ):
        said = refusal(run("fumi-edge", cwd=tmp_path, **{variable: value + "\r"}))
        assert f"variable {variable} contains a carriage return: save its file with Unix line ends" in said


def test_a_list_with_commas_is_named_as_that(tmp_path: Path) -> None:
    for program, name, value in (
        ("fumi-edge", "LISTEN", "127.0.0.1:465,127.0.0.1:587"),
        ("fumi-edge", "BACKEND", "127.0.0.1:2525,[::1]:2525"),
        ("fumi-core", "LISTEN", ":25,:587"),
        ("fumi-core", "TRUSTED_PROXY", "192.0.2.0/24,198.51.100.0/24"),
        ("fumi-core", "DOMAIN", "example.org,example.com"),
    ):
        said = refusal(run(program, cwd=tmp_path, **{f"{program.upper().replace('-', '_')}_{name}": value}))
        assert repr(value) in said
        assert "repeat the flag" in said
        assert "by spaces" in said
        assert "IPv6" not in said


@pytest.mark.parametrize(
    ("key", "hint"),
    [("lisen", "is it listen?"), ("require_tsl", "is it require-tls?"), ("chek", "keys are"), ("xyzzy", "keys are")],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(key: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(f"{key} = 1\n")
    for program in ("fumi-core", "fumi-edge"):
        assert f"f.toml: unknown key {key!r}: {hint}" in refusal(run(program, "--config", "f.toml", cwd=tmp_path))


@pytest.mark.parametrize(
    ("program", "variable", "hint"),
    [
        ("fumi-edge", "FUMI_EDGE_REQIRE_TLS", "is it FUMI_EDGE_REQUIRE_TLS?"),
        ("fumi-edge", "FUMI_EDGE_MAX_CLIENT", "is it FUMI_EDGE_MAX_CLIENTS?"),
        ("fumi-edge", "FUMI_EDGE_XYZZY", "every flag in --help can be a variable"),
        ("fumi-edge", "FUMI_EDGE_PORT", "unknown variable"),
        ("fumi-core", "FUMI_CORE_REQUIRE-TLS", "is it FUMI_CORE_REQUIRE_TLS?"),
        ("fumi-core", "FUMI_CORE_APP", "unknown variable"),
        ("fumi-core", "FUMI_CORE_", "unknown variable"),
    ],
)
def test_a_variable_that_is_no_setting_is_refused_and_the_nearest_named(
    program: str, variable: str, hint: str, tmp_path: Path
) -> None:
    for more in ((), ("--check",)):
        said = refusal(run(program, *more, cwd=tmp_path, **{variable: "1"}))
        assert f"unknown variable {variable}: " in said
        assert hint in said
    for flag in ("--help", "--version"):
        assert run(program, flag, cwd=tmp_path, **{variable: "1"}).returncode == 0


def test_variables_of_others_are_left_alone(tmp_path: Path) -> None:
    links = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "2525",
        "SERVICE_PORT_SMTP": "2525",
        "PORT": "tcp://10.0.0.1:2525",
        "PORT_2525_TCP": "tcp://10.0.0.1:2525",
        "PORT_2525_TCP_ADDR": "10.0.0.1",
        "PORT_2525_TCP_PORT": "2525",
        "PORT_2525_TCP_PROTO": "tcp",
        "METRICS_PORT": "tcp://10.0.0.2:9525",
        "METRICS_SERVICE_HOST": "10.0.0.2",
    }
    others = {f"FUMI_CORE_{name}": value for name, value in links.items()}
    others |= {"FUMI_EDGE_REQIRE_TLS": "1", "FUMI_BACKEND": "x", "_FUMI_CORE_X": "x", "FUMI_CORES": "x"}
    flags = ("--listen", "127.0.0.1:0", "--deliver", "discard:", "--check")
    done = run("fumi-core", *flags, cwd=tmp_path, **others)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("check", [(), ("--check",)])
@pytest.mark.parametrize("flag", ["user", "cert", "key", "client-ca"])
def test_names_of_files_and_users_must_not_be_empty(flag: str, check: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(f"{flag} = ''")
    assert f"'--{flag}': must not be empty" in refusal(run("fumi-edge", f"--{flag}", "", *check, cwd=tmp_path))
    assert f'f.toml: {flag} = "": must not be empty' in refusal(run("fumi-edge", "--config", "f.toml", *check, cwd=tmp_path))


@pytest.mark.parametrize(
    ("program", "text", "said"),
    [
        ("fumi-edge", 'user = "a\\u0000b"', "f.toml: user = "),
        ("fumi-edge", 'cert = ["a", "a\\u0000b"]', "must not contain NUL"),
        ("fumi-core", 'users = "a\\u0000b"', "must not contain NUL"),
        ("fumi-core", f"size = {'9' * 5000}", "f.toml: "),
        ("fumi-core", f"size = 0x{'f' * 5000}", "f.toml: size = "),
        ("fumi-core", f"listen = [0x{'f' * 5000}]", "f.toml: listen = "),
        ("fumi-edge", f"idle-timeout = 0x{'f' * 5000}", "f.toml: idle-timeout = "),
        ("fumi-core", f"size = {'[' * 20000}", "f.toml: "),
        ("fumi-core", f"size = {'[' * 100}{']' * 100}", "f.toml: size = "),
        ("fumi-core", f"a{'.a' * 20000} = 1", "f.toml: "),
    ],
    ids=["user", "cert", "users", "digits", "hex", "listed", "seconds", "deep", "nested", "dotted"],
)
def test_a_file_that_is_out_of_all_measure_is_one_line(program: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(text)
    line = refusal(run(program, "--config", "f.toml", "--check", cwd=tmp_path))
    assert said in line
    assert len(line) < 400


def test_a_key_in_both_spellings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text("require-tls = true\nrequire_tls = false\n")
    assert "f.toml: require-tls and require_tls are the same setting" in refusal(
        run("fumi-core", "--config", "f.toml", cwd=tmp_path)
    )
    (tmp_path / "f.toml").write_text(
        "listen = ':1'\ndrain-timeout = 1\ndeliver = 'discard:'\n[core]\nlisten = '127.0.0.1:0'\ndrain_timeout = 2\n"
    )
    assert run("fumi-core", "--config", "f.toml", "--check", cwd=tmp_path).returncode == 0  # the section's own wins


def test_settings_are_variables_config_too(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text("size = 'x'")
    assert "f.toml" in refusal(run("fumi-core", cwd=tmp_path, FUMI_CORE_CONFIG="f.toml"))


@pytest.mark.parametrize("program", ["fumi-core", "fumi-edge"])
def test_h_is_help(program: str, tmp_path: Path) -> None:
    done = run(program, "-h", cwd=tmp_path)
    assert done.stdout.startswith(f"Usage: {program}")
    assert "-h, --help" in done.stdout


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("program", ["fumi-core", "fumi-edge"])
def test_a_socket_of_ones_own_was_not_passed(program: str, metrics: bool, tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    flags = ["--listen", "127.0.0.1:0", *(("--metrics",) if metrics else ("--listen",)), "fd:3"]
    if program == "fumi-edge":
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=a -keyout key -out cert"
        subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
        flags += ["--cert", "cert", "--key", "key", "--backend", "127.0.0.1:9"]
    assert "fd:3: descriptor 3 is not an open socket" in refusal(run(program, *flags, cwd=tmp_path))


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        ("a.org,b.org", "separate several by spaces in the environment"),
        ("a.org b.org", "separate several by spaces in the environment"),
        ("*.example.org", "wildcards are not supported"),
        ("", "'' is not a domain"),
        ("joe@example.org", "is not a domain"),
        (".example.org", "is not a domain"),
        ("example.org.", "is not a domain"),
        ("-.example", "is not a domain"),
        ("a." * 128 + "example", "is not a domain"),
    ],
)
def test_a_domain_that_no_recipient_can_have_is_an_error(domain: str, said: str, tmp_path: Path) -> None:
    line = refusal(run("fumi-core", "--domain", domain, "--deliver", "discard:", "--check", cwd=tmp_path))
    assert "'--domain'" in line
    assert said in line
    assert "deliver" not in line


def test_domains_are_names_as_they_stand_in_addresses(tmp_path: Path) -> None:
    flags = ("--listen", "127.0.0.1:0", "--deliver", "discard:", "--check")
    for domain in (
        "example.org",
        "EXAMPLE.org",
        "localhost",
        "a-b.example",
        "xn--bcher-kva.example",
        "bücher.example",
        "[192.0.2.1]",
    ):
        assert run("fumi-core", "--domain", domain, *flags, cwd=tmp_path).returncode == 0, domain
    assert run("fumi-core", *flags, cwd=tmp_path, FUMI_CORE_DOMAIN="a.example b.example").returncode == 0


def test_there_is_no_hash_of_no_password(tmp_path: Path) -> None:
    for typed in ("", "\n"):
        done = finished("fumi-core", "--hash-password", cwd=tmp_path, given=typed)
        assert "the password is empty" in refusal(done)
        assert done.stdout == ""
