"""An app of fumi_edge with TLS, which mypy --strict must accept. A test makes it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

from fumi_edge import AuthContext, DataContext, Fumi, MailContext, Next, SMTPError, plugins


def make(certificate: Path, key: bytes) -> Fumi:
    app = Fumi(secure=True, key=key, cert=certificate, ca=None, auth_optional=True, max_clients=100)

    @app.on_auth
    async def auth(ctx: AuthContext, next: Next) -> None:
        ctx.accept({"name": ctx.credentials.username})
        await next()

    @app.on_mail_from
    async def mail_from(ctx: MailContext, next: Next) -> None:
        if ctx.session.tls is None:
            raise SMTPError("5.7.0 TLS first", 530)
        await next()

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.spool()
        assert_type((await ctx.message())["subject"] is None, bool)
        await next()

    def swap(app: Fumi) -> None:
        app.update_secure_context(cert=certificate, key=key)

    return assert_type(app.use(plugins.require_tls()).use(swap), Fumi)
