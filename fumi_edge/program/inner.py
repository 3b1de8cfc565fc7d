"""MODULE:APP: an app that the edge runs in its own processes, in place of a backend."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from prometheus_client import CollectorRegistry

from fumi_core.program.loading import load_app
from fumi_core.runtime.config_file import ListenerTable
from fumi_core.runtime.metrics_server import Page
from fumi_core.runtime.settings import SettingError
from fumi_core.server.metrics import CoreMetrics
from fumi_edge.app import InnerApp, LocalCore
from fumi_edge.program.flags import Flags

_OF_BACKENDS = (
    *("backend", "backend_ca", "backend_name", "backend_cert", "backend_key"),
    *("balance", "connect_timeout", "health_interval", "health_timeout", "proxy_protocol"),
)


class Inner:
    """The app, and the core that serves it. ``core`` is the edge's direct path, and its backend for plaintext."""

    def __init__(self, flags: Flags, given: Collection[str], tables: Sequence[ListenerTable] = ()) -> None:
        """Import the app; ``given`` are the names of the flags that were given. Raises SettingError."""
        self._reference = reference = flags["app"] or ""
        self.check_settings(given, tables)
        loaded = load_app(reference)
        self._app = InnerApp().adopt(loaded)
        self._app.observer = loaded.observer
        self.configure(flags)
        self._options = loaded.options
        self.core = LocalCore(starttls=_offers_starttls(flags, tables))

    def check_settings(self, given: Collection[str], tables: Sequence[ListenerTable]) -> None:
        """Raise SettingError if a flag of backends is given, or a listener's table has a key of backends."""
        for name in _OF_BACKENDS:
            if name in given:
                raise SettingError(f"--{name.replace('_', '-')} is for backends, which {self._reference} replaces: remove it")
        for table in tables:
            for name in _OF_BACKENDS:
                if name in table.values:
                    key = name.replace("_", "-")
                    raise SettingError(
                        f"{table.section} {table.address}: {key} is for backends, which {self._reference} replaces: remove it"
                    )

    def defaults(self, flags: Flags, tables: Sequence[ListenerTable] = ()) -> Flags:
        """The flags, with the app's options for those that were not given."""
        hidden = flags["hide_starttls"] or (self._options.hide_starttls and _offers_starttls(flags, tables))
        return {**flags, "max_clients": flags["max_clients"] or self._options.max_clients, "hide_starttls": hidden}

    def configure(self, flags: Flags) -> None:
        """Apply the flags that also concern the app."""
        self._app.configure(close_timeout=flags["drain_timeout"])

    def check(self) -> None:
        """Raise SettingError if no client can send mail to the app."""
        if problem := self._app.startup_problem():
            raise SettingError(f"{self._reference}: no client can send mail: {problem}")

    def count_in(self, registry: CollectorRegistry) -> None:
        """Add the core's metrics to those of the edge."""
        self._app.observer = CoreMetrics(registry, self._app.tally)

    async def start(self) -> None:
        self.core.attach(await self._app.start())

    async def close(self) -> None:
        await self._app.close()

    def pages(self) -> Mapping[str, Page]:
        """No pages of its own."""
        return {}

    def instructions(self) -> str | None:
        """Prints nothing after the start."""
        return None


def _offers_starttls(flags: Flags, tables: Sequence[ListenerTable]) -> bool:
    return bool(flags["starttls_listen"]) or any(each.values.get("mode") == "starttls" for each in tables)
