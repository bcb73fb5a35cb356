"""The function: one FastAPI application, which Vercel runs for every request. `vercel deploy` finds `app` here."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import anthropic
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from _shared import handler, log
from _shared.dispatcher import open_client
from _shared.errors import LaunchFailed, SandboxesError, SettingsError
from _shared.settings import Settings, credential, load, setting
from _shared.webhook import Verifier
from function import Host
from sandbox import SETTINGS, open_provider
from store import open_store

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # the handler says which one it answers
STATUS_SECONDS = 20.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FunctionSettings:
    """Who may call what, besides Anthropic's webhooks."""

    cron_secret: str | None = setting(
        "CRON_SECRET",
        "What a caller of `/cron` must send as a bearer; Vercel's own cron does, once it is set. Without it nothing but"
        " webhooks sweeps.",
        parse=credential,
        default=None,
        secret=True,
    )
    status_key: str | None = setting(
        "STATUS_KEY",
        "What a caller of `/status` must send as a bearer. Unset: there is no status.",
        parse=credential,
        default=None,
        secret=True,
    )


def open_host(environ: Mapping[str, str]) -> Host:
    """The host as the environment describes it. Raises `SettingsError`."""
    settings = Settings.from_env(environ, *SETTINGS, FunctionSettings)
    own = load(FunctionSettings, environ)
    if own.cron_secret is not None and own.cron_secret == own.status_key:
        raise SettingsError("CRON_SECRET and STATUS_KEY are the same: who may see the status could sweep, too")
    store = open_store(environ, settings.environment_id)
    provider = open_provider(environ, settings, store)
    if store is None:
        reason = "no store: instances drain, sweep and make sandboxes beside each other, and failures are not counted"
        _log.warning(log.line("no_store", provider=provider.name, reason=reason))
    if own.cron_secret is None:
        reason = "CRON_SECRET is not set: /cron is closed, and only webhooks sweep"
        _log.warning(log.line("no_cron", provider=provider.name, reason=reason))
    return Host(settings, provider, store, Verifier(settings.webhook_keys), own.cron_secret, own.status_key)


def create_app(host: Host | None = None) -> FastAPI:
    """The application. Without `host` it reads the environment when it starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log.configure()
        try:
            app.state.host = app.state.host or open_host(os.environ)
        except SandboxesError as error:  # requests are answered with a 503: a process that ends would only start again
            _log.error(log.line("settings", reason=str(error)))
        yield
        if app.state.host and app.state.host.working:
            await asyncio.wait(app.state.host.working)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.host = host
    app.add_api_route("/webhook", webhook, methods=_METHODS)
    app.add_api_route("/cron", cron, methods=["GET", "POST"])
    app.add_api_route("/status", status, methods=["GET"])
    app.add_api_route("/healthz", healthz, methods=["GET"])
    return app


async def webhook(request: Request) -> Response:
    """Answers at once; the work happens after the answer, in the same invocation."""
    host: Host | None = request.app.state.host
    if host is None:
        return _not_configured()
    reply = await handler.handle(
        handler.Request(request.method, request.headers, request.stream()), verifier=host.verifier, wake=host.wake
    )
    return Response(reply.body, reply.status, dict(reply.headers))


async def cron(request: Request) -> Response:
    """Sweeps, after its answer."""
    host: Host | None = request.app.state.host
    if host is None:
        return _not_configured()
    if not _bears(request, host.cron_secret):
        return JSONResponse({"error": "the cron secret is missing or wrong"}, 401)
    host.sweep()
    return JSONResponse({"ok": True}, 202)


async def status(request: Request) -> Response:
    """The queue's depth, the sandboxes, the store: for people and monitors."""
    host: Host | None = request.app.state.host
    if host is None:
        return _not_configured()
    if host.status_key is None:
        return JSONResponse({"error": "there is no status: STATUS_KEY is not set"}, 404)
    if not _bears(request, host.status_key):
        return JSONResponse({"error": "the status key is missing or wrong"}, 401)
    try:
        async with asyncio.timeout(STATUS_SECONDS), open_client(host.settings) as client:
            queue = await client.beta.environments.work.stats(host.settings.environment_id)
            sandboxes = [info async for info in host.provider.sandboxes()]
    except (anthropic.APIError, LaunchFailed, TimeoutError) as error:
        _log.warning(log.line("status", error=error))
        return JSONResponse({"error": "Anthropic or Vercel does not answer: see the log"}, 502)
    if host.store is not None:
        await host.store.get("signals")
    return JSONResponse(
        {
            "environment": host.settings.environment_id,
            "queue": {"waiting": queue.depth, "reserved": queue.pending, "oldest": queue.oldest_queued_at},
            "sandboxes": {"running": sum(info.running for info in sandboxes), "all": len(sandboxes)},
            "store": "none" if host.store is None else "answers" if host.store.answers else "does not answer",
        }
    )


async def healthz(request: Request) -> Response:
    """Whether this instance answers and has its settings."""
    return JSONResponse({"ok": True}) if request.app.state.host else _not_configured()


def _not_configured() -> Response:
    return JSONResponse({"error": "the settings are unusable: see the log"}, 503)


def _bears(request: Request, secret: str | None) -> bool:
    """Whether the caller sent the secret; nobody has one that is not set."""
    sent = request.headers.get("authorization", "").encode()
    return secret is not None and hmac.compare_digest(sent, f"Bearer {secret}".encode())


app = create_app()
