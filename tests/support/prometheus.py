"""A real Prometheus, and what it answers over its HTTP API."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.waiting import until

OPS = Path(__file__).parents[2] / "ops"
RULES = (OPS / "prometheus" / "rules.yml").read_text()
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def quicker(rules: str, factor: int) -> str:
    """The rules with each ``for:`` and each range divided by ``factor``: ``[5m]`` is ``[15s]`` with 20. All else stays."""

    def divided(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) * _SECONDS[found[3]] // factor}s{found[4]}"

    return re.sub(r"(\[|for: )(\d+)([smh])(\]|\n)", divided, rules)


class Prometheus:
    """A running Prometheus, queried over its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    @classmethod
    def start(cls, programs: Programs, configuration: str, rules: str) -> Prometheus:
        """One with this prometheus.yml, which names rules.yml, and these rules; it has read both and answers."""
        (programs.directory / "prometheus.yml").write_text(configuration)
        (programs.directory / "rules.yml").write_text(rules)
        port = free_port()
        flags = [f"--web.listen-address=127.0.0.1:{port}", "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb"]
        programs.start("prometheus", *flags, port=port, log="prometheus.log")
        prometheus = cls(port)
        until(prometheus.ready, "its readiness")
        return prometheus

    def ready(self) -> bool:
        """Whether it answers questions: it listens before it does."""
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=60):
                return True
        except urllib.error.HTTPError:
            return False

    def get(self, what: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return json.load(answer)["data"]

    def ask(self, query: str) -> float | None:
        """The value of the one series that an expression gives; None when it gives none."""
        found = self.get("query", query=query)["result"]
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None
