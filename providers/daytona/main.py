"""The host: a webhook server that also polls and sweeps. `python main.py`, or any ASGI server with `main:app`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from anthropic import AnthropicError
from fastapi import FastAPI, HTTPException, Request, Response

from _shared import handler, log, worker
from _shared.dispatcher import Dispatcher, open_client
from _shared.errors import LaunchFailed, SandboxesError, SettingsError
from _shared.runner_secrets import RedactingFormatter
from _shared.settings import Settings, credential, load, port, setting
from _shared.webhook import Verifier
from daytona_settings import DaytonaSettings
from sandbox import DaytonaProvider, open_provider

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # the handler says which one it answers
_CLOSE_CONNECTIONS_SECONDS = 4
_CLOSE_SECONDS = 15.0  # for what is under way when told to stop; with the connections' below 25
_STATUS_SECONDS = 10.0  # for each of the two that the status page asks
_LATEST_LINES = 50

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostSettings:
    """What the server needs beside the shared settings."""

    status_key: str | None = setting(
        "STATUS_KEY", "The bearer that `GET /status` asks for. Unset: there is no status page.", parse=credential,
        default=None, secret=True,
    )  # fmt: skip


class Latest(logging.Handler):
    """The last lines of the log, as they were written."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=_LATEST_LINES)
        self.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@dataclass(frozen=True)
class Host:
    """What the environment describes, ready to be served."""

    settings: Settings
    provider: DaytonaProvider
    verifier: Verifier
    status_key: str | None = field(repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Host:
        """Raises `SettingsError`."""
        try:
            settings = Settings.from_env(environ)
        except SettingsError as error:
            load(DaytonaSettings, environ, [error.args[0]])  # raises, and names this provider's problems too
            raise
        own = load(HostSettings, environ)
        return cls(settings, open_provider(environ, settings), Verifier(settings.webhook_keys), own.status_key)


def create_app(host: Host | None = None, *, poll: bool = True) -> FastAPI:
    """The server. Without `host` it reads the environment when it starts; without `poll` it takes new work on webhooks
    and at the sweep each minute only."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served = host or host_of_this_process()
        latest = Latest()
        logging.getLogger().addHandler(latest)
        dispatcher = Dispatcher(client=open_client(served.settings), settings=served.settings, provider=served.provider)
        app.state.verifier, app.state.wake, app.state.suspect = served.verifier, dispatcher.wake, dispatcher.suspect
        app.state.host, app.state.latest = served, latest
        stop = asyncio.Event()
        working = asyncio.create_task(worker.run(dispatcher, stop=stop, poll=poll))
        working.add_done_callback(end_with_the_worker)
        _log.info(log.line("serving", provider=served.provider.name))
        try:
            yield
        finally:
            stop.set()
            await dispatcher.close(_CLOSE_SECONDS)
            working.cancel()
            await asyncio.wait([working])
            await served.provider.close()
            _log.info(log.line("stopped", provider=served.provider.name))
            logging.getLogger().removeHandler(latest)

    def end_with_the_worker(working: asyncio.Task[None]) -> None:
        """Without its sweep this process would look well and lose sessions: it ends, to be started again."""
        if not working.cancelled() and (error := working.exception()) is not None:
            _log.critical(log.line("failed", error=error), exc_info=error)
            app.state.failed = True
            signal.raise_signal(signal.SIGTERM)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.failed = False
    app.add_api_route("/webhook", webhook, methods=_METHODS)
    app.add_api_route("/healthz", healthz, methods=["GET"])
    app.add_api_route("/status", status, methods=["GET"])
    return app


def host_of_this_process() -> Host:
    """For another server, which has not set up our log, and would show a wrong setting as a traceback."""
    log.configure()
    try:
        return Host.from_env(os.environ)
    except SandboxesError as error:
        _log.error(log.line("settings", reason=str(error)))
        os._exit(2)  # as `main` does; nothing runs yet


async def webhook(request: Request) -> Response:
    """Answers at once; the work happens in the background."""
    reply = await handler.handle(
        handler.Request(request.method, request.headers, request.stream()),
        verifier=request.app.state.verifier,
        wake=request.app.state.wake,
        suspect=request.app.state.suspect,
    )
    return Response(reply.body, reply.status, dict(reply.headers))


async def healthz() -> dict[str, bool]:
    """Whether this process answers."""
    return {"ok": True}


async def status(request: Request) -> dict[str, Any]:
    """What waits in the queue, what runs, and what this process last said. Asks Anthropic and Daytona each time."""
    host: Host = request.app.state.host
    if host.status_key is None:
        raise HTTPException(404)
    given = request.headers.get("authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {host.status_key}".encode()):
        raise HTTPException(401, headers={"www-authenticate": "Bearer"})
    queue: Any = None
    async with open_client(host.settings) as client:
        with contextlib.suppress(AnthropicError, TimeoutError):
            async with asyncio.timeout(_STATUS_SECONDS):
                queue = (await client.beta.environments.work.stats(host.settings.environment_id)).model_dump(
                    mode="json"
                )
    sandboxes: Any = None
    with contextlib.suppress(LaunchFailed, TimeoutError):
        async with asyncio.timeout(_STATUS_SECONDS):
            sandboxes = [asdict(info) async for info in host.provider.sandboxes()]
    return {"queue": queue, "sandboxes": sandboxes, "log": list(request.app.state.latest.lines)}


def main() -> int:
    """The command line. Exit codes: 0 told to stop, 1 the poller failed, 2 a setting is wrong."""
    parser = argparse.ArgumentParser(description="Serves webhooks and polls. Settings: see README.md.")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--port", type=port, default=8080, help="the port, 0 for a free one (%(default)s)")
    parser.add_argument("--no-poll", action="store_true", help="rely on webhooks and the sweep each minute")
    options = parser.parse_args()
    log.configure()
    try:
        host = Host.from_env(os.environ)
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (SandboxesError, OSError) as error:
        _log.error(log.line("settings", reason=str(error)))
        return 2
    app = create_app(host, poll=not options.no_poll)

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(1 if app.state.failed else 0)

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has shut down in order
        signal.signal(number, leave)
    address, bound = listener.getsockname()[:2]
    sys.stdout.write(f"listening on http://{address}:{bound}\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=_CLOSE_CONNECTIONS_SECONDS
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


app = create_app()

if __name__ == "__main__":
    sys.exit(main())
