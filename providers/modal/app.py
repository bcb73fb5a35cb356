"""What is deployed: `modal deploy app.py`. A webhook, and the one function that drains and sweeps.

Nothing is read when this file is imported: a deployment needs no setting, and a function reads the secret that Modal
puts into its environment when it starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import cache

import modal
import modal.exception
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from _shared import handler, log
from _shared.dispatcher import Dispatcher, open_client
from _shared.errors import SettingsError
from _shared.settings import Settings
from _shared.webhook import Verifier
from image import sandbox_image
from sandbox import APP, SETTINGS, open_provider

SECRET = "sandboxes"  # made of .env: see README.md  # noqa: S105
DISPATCH_SECONDS = 900  # for one drain or sweep; a drain takes up to 240 s, and its launches 90
IDLE_SECONDS = 20  # then a container ends; below a minute, so that the next sweep's reads a changed secret
WAKE_SECONDS = 5.0  # for handing the drain over; the sweep comes anyway
DRAINS_AT_ONCE = 100  # in the one container: they share its dispatcher, which drains once for all of them
OURS = ("_shared", "image", "modal_errors", "modal_settings", "sandbox")  # the folder's modules that run in a function

_log = logging.getLogger(__name__)

app = modal.App(APP)
sandboxes_image = sandbox_image().add_local_python_source(*OURS)
secret = modal.Secret.from_name(SECRET)


@cache
def _dispatcher() -> Dispatcher:
    """This container's, made by its first call. Raises `SettingsError`."""
    log.configure()
    settings = Settings.from_env(os.environ, *SETTINGS)
    provider = open_provider(os.environ, settings, app=app, image=sandboxes_image)
    return Dispatcher(client=open_client(settings), settings=settings, provider=provider)


@cache
def _sweeping() -> asyncio.Lock:
    """Held by this container's sweep."""
    return asyncio.Lock()


@cache
def _verifier() -> Verifier | None:
    """This container's, made by its first call. None when the settings are unusable, which the log then says once."""
    log.configure()
    try:
        return Verifier(Settings.from_env(os.environ).webhook_keys)
    except SettingsError as error:
        _log.error(log.line("settings", provider="modal", reason=str(error)))
        return None


@app.function(
    image=sandboxes_image,
    secrets=[secret],
    schedule=modal.Period(minutes=1),
    max_containers=1,
    scaledown_window=IDLE_SECONDS,
    timeout=DISPATCH_SECONDS,
)
@modal.concurrent(max_inputs=DRAINS_AT_ONCE)
async def dispatch(sweep: bool = True) -> None:
    """Drains the queue; from the schedule, which passes nothing, sweeps too. There is one container, so one drain: a
    call that comes during it makes it poll once more (R8). And one sweep: one that takes over a minute is not doubled.
    """
    dispatcher, sweeping = _dispatcher(), _sweeping()
    if not sweep or sweeping.locked():
        await dispatcher.drain()
        return
    async with sweeping:
        await dispatcher.sweep()


@app.function(image=sandboxes_image, secrets=[secret], scaledown_window=IDLE_SECONDS)
@modal.concurrent(max_inputs=DRAINS_AT_ONCE)
@modal.fastapi_endpoint(method="POST")
async def webhook(request: Request) -> Response:
    """Answers at once; the drain is another function's."""
    if (verifier := _verifier()) is None:
        return JSONResponse({"error": "the settings are unusable: see the log"}, 503)
    woken: list[object] = []
    seen = handler.Request(request.method, request.headers, request.stream())
    reply = await handler.handle(seen, verifier=verifier, wake=woken.append)
    if woken:
        await _wake()
    return Response(reply.body, reply.status, dict(reply.headers))


async def _wake() -> None:
    """Has the queue drained. Failing that, the sweep does it within a minute: the webhook carries no work."""
    try:
        async with asyncio.timeout(WAKE_SECONDS):
            await dispatch.spawn.aio(sweep=False)
    except (modal.exception.Error, TimeoutError) as error:
        _log.warning(log.line("wake", error=error, reason="the drain could not be started; the next sweep drains"))
