"""Generated ``[[edge.listener]]`` tables: each is listeners, or an error for the user; never another exception."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import cast

import click
import pytest

from fumi_core.runtime.config_file import listener_tables
from fumi_edge import cli
from fumi_edge.program.flags import Flags
from fumi_edge.program.listeners import LISTENER_KEYS
from fumi_edge.program.settings import edge_settings
from fumi_edge.settings import EdgeSettings
from tests.support.certificates import CertificateFiles

FILES = int(os.environ.get("FUZZ_INPUTS", "3000"))
KEYS = ("address", "mode", *LISTENER_KEYS.flags)
OTHERS = ("workers", "listen", "config", "check", "", "adress", "mode ", "listener", "max-clients", "ü", "a.b", "address.host")
GOOD = {
    "address": ('":25"', '"127.0.0.1:0"', '"[::1]:587"', '"unix:/tmp/s"', '"fd:3"', '"localhost:465"'),
    "mode": ('"tls"', '"starttls"'),
    "backend": (
        '"127.0.0.1:2525"',
        '["127.0.0.1:2525", "unix:/run/core"]',
        '["[::1]:25"]',
        '"tls:core:25"',
        '["tls:core:26", ":2"]',
    ),
    "backend-name": ('"mail.example"', '"192.0.2.1"'),
    "balance": ('"first"', '"leastconn"'),
    "proxy-protocol": ('"v1"', '"off"'),
    "min-tls": ('"1.3"', "1.2"),
    "ciphers": ('"ECDHE+AESGCM"',),
    "alpn": ('"smtp, x"',),
    "client-ca": ('"ca.pem"',),
    "client-cert": ('"required"',),
    "trusted-proxy": ('["10.0.0.0/8", "unix"]', '"::1"'),
    "rate-per-ip": ('"10/s"',),
    "max-clients-per-ip": ("20", '"20"'),
    "idle-timeout": ("1.5", "60"),
    "handshake-timeout": ("5",),
}
FILE_KEYS = ("cert", "key", "backend-ca", "backend-cert", "backend-key")
VALUES = (
    *("true", "false", "0", "-1", "1", "25", "9223372036854775808", "0x" + "f" * 5000, "1e400", "nan", "inf", "2020-01-01"),
    *("07:32:00", '""', '"x"', '"\\u0000"', '"\\n"', '"é"', '":"', '":99999999"', '"[]:1"', '"a..b:1"', '"fd:x"', '"unix:"'),
    *("[]", "[[]]", '["a", 1]', "{}", "{ a = 1 }", "[{ a = [1] }]", "[" * 200 + "]" * 200, '"' + "x" * 5000 + '"'),
)


def value(chance: Random, key: str, certificate: CertificateFiles) -> str:
    if chance.random() < 0.2:
        return chance.choice(VALUES)
    if key in FILE_KEYS:
        return f'"{certificate[key.endswith("key")]}"'
    return chance.choice(GOOD.get(key, ("true", "false")))


def table(chance: Random, certificate: CertificateFiles) -> str:
    keys = {"address", "mode"} if chance.random() < 0.9 else set()
    keys |= {chance.choice(KEYS if chance.random() < 0.95 else OTHERS) for _ in range(chance.randrange(6))}
    lines = []
    for key in sorted(keys):
        spelling = key.replace("-", "_") if chance.random() < 0.1 else key
        lines.append(f"'{spelling}' = {value(chance, key, certificate)}")
    return "\n".join(lines)


def document(chance: Random, certificate: CertificateFiles) -> str:
    edge = f"cert = '{certificate[0]}'\nkey = '{certificate[1]}'\nbackend = ':2525'\n" if chance.random() < 0.8 else ""
    if chance.random() < 0.1:
        edge += table(chance, certificate) + "\n"
    if chance.random() < 0.05:
        return f"[edge]\n{edge}listener = {chance.choice(VALUES)}\n"
    headings = ["[[edge.listener]]"] * chance.randrange(1, 4) + ["[edge.listener]"] * (chance.random() < 0.02)
    return f"[edge]\n{edge}" + "".join(f"{heading}\n{table(chance, certificate)}\n" for heading in headings)


def read(path: Path) -> EdgeSettings:
    ctx = cli.main.make_context("fumi-edge", ["--config", str(path)])
    return edge_settings(cast(Flags, ctx.params), listener_tables(ctx))


@pytest.mark.parametrize("seed", range(5))
def test_every_file_is_listeners_or_one_error(tmp_path: Path, certificate: CertificateFiles, seed: int) -> None:
    path, good = tmp_path / "edge.toml", 0
    for number in range(FILES // 5):
        text = document(Random(f"{seed}:{number}"), certificate)
        path.write_text(text)
        try:
            settings = read(path)
        except click.ClickException:
            continue
        except Exception as error:
            raise AssertionError(f"{error!r} for this file:\n{text}") from error
        good += 1
        assert len(settings.listeners) == text.count("[[edge.listener]]"), text
        assert all(each.certificates and each.backends for each in settings.listeners), text
    assert FILES // 150 < good < FILES // 6
