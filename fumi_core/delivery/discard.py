"""``discard:``: accepts every message and stores none. For measuring, and for trying a setup out."""

from __future__ import annotations

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.middleware import Next
from fumi_core.server.observer import DeliveryResult


class Discard:
    name = "discard"

    def __call__(self, app: Fumi) -> None:
        observer = app.observer

        async def deliver(ctx: DataContext, next: Next) -> None:
            await ctx.stream.skip()
            observer.delivery(self.name, DeliveryResult.FAILED if ctx.stream.size_exceeded else DeliveryResult.OK)

        app.on_data(deliver)

    def dependency_problem(self) -> str | None:
        return None

    def check(self) -> str | None:
        return None
