"""The host: a webhook server that also polls and sweeps. `python main.py`, or any ASGI server with `main:app`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request, Response

from _shared import handler, log, worker
from _shared.dispatcher import Dispatcher, open_client
from _shared.errors import SandboxesError
from _shared.settings import Settings, port
from _shared.webhook import Verifier
from sandbox import DockerProvider, open_provider

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # the handler says which one it answers
_CLOSE_CONNECTIONS_SECONDS = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Host:
    """What the environment describes, ready to be served."""

    settings: Settings
    provider: DockerProvider
    verifier: Verifier

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Host:
        """Raises `SettingsError`."""
        settings = Settings.from_env(environ)
        return cls(settings, open_provider(environ, settings), Verifier(settings.webhook_keys))


def create_app(host: Host | None = None, *, poll: bool = True) -> FastAPI:
    """The server. Without `host` it reads the environment when it starts; without `poll` it takes new work on webhooks
    and at the sweep each minute only."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served = host or host_of_this_process()
        dispatcher = Dispatcher(client=open_client(served.settings), settings=served.settings, provider=served.provider)
        app.state.verifier, app.state.wake, app.state.suspect = served.verifier, dispatcher.wake, dispatcher.suspect
        stop = asyncio.Event()
        working = asyncio.create_task(worker.run(dispatcher, stop=stop, poll=poll))
        working.add_done_callback(end_with_the_worker)
        _log.info(log.line("serving", provider=served.provider.name))
        try:
            yield
        finally:
            stop.set()
            await dispatcher.close(worker.SHUTDOWN_SECONDS)
            working.cancel()
            await asyncio.wait([working])
            await served.provider.close()
            _log.info(log.line("stopped", provider=served.provider.name))

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
