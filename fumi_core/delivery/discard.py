"""``discard:``: takes every message and keeps none. For measuring, and for trying a setup out."""

from __future__ import annotations

from fumi_core.app import Fumi
from fumi_core.contexts import DataContext
from fumi_core.middleware import Next


class Discard:
    name = "discard"

    def __call__(self, app: Fumi) -> None:
        observer = app.observer

        def deliver(ctx: DataContext, next: Next) -> None:
            ctx.stream.discard()
            observer.delivery(self.name, "ok")

        app.on_data(deliver)

    def problem(self) -> str | None:
        return None
