"""The host that needs no platform: one process that answers webhooks, polls and sweeps.

A folder's `main.py` names its provider and its settings; the rest is here. The only shared module that needs fastapi
and uvicorn: a folder whose platform runs the web server leaves it out.
"""

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
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Protocol

import uvicorn
from anthropic import AnthropicError
from fastapi import FastAPI, HTTPException, Request, Response

from . import handler, log, worker
from .dispatcher import Dispatcher, open_client
from .errors import LaunchFailed, SandboxesError
from .provider import Provider
from .runner_secrets import RedactingFormatter
from .settings import Settings, credential, load, port, setting
from .webhook import Verifier

# Told to stop, the process is gone within 25 s: it closes its connections, then ends what is under way.
CLOSE_CONNECTIONS_SECONDS = 4
CLOSE_SECONDS = 15.0
STATUS_SECONDS = 10.0  # for each of the two that the status page asks

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # the handler says which one it answers
_LATEST_LINES = 50

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """What the server needs beside the shared settings."""

    status_key: str | None = setting(
        "STATUS_KEY", "The bearer that `GET /status` asks for. Unset: there is no status page.", parse=credential,
        default=None, secret=True,
    )  # fmt: skip


class LivingProvider(Provider, Protocol):
    """A provider of a process that ends in order."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Host:
    """What the environment describes, ready to be served."""

    settings: Settings
    provider: LivingProvider
    verifier: Verifier
    status_key: str | None = field(default=None, repr=False)


class Server:
    """`server = Server(open_provider, SETTINGS)` in a folder's `main.py`; `server.app()` is what an ASGI server serves,
    `server.main()` the command line. Reads nothing before it starts."""

    def __init__(
        self, open_provider: Callable[[Mapping[str, str], Settings], LivingProvider], own: tuple[type, ...]
    ) -> None:
        self._open_provider = open_provider
        self._own = own

    def open(self, environ: Mapping[str, str]) -> Host:
        """The host as `environ` describes it. Raises `SettingsError`, with all that is wrong in one."""
        settings = Settings.from_env(environ, *self._own, ServerSettings)
        key = load(ServerSettings, environ).status_key
        return Host(settings, self._open_provider(environ, settings), Verifier(settings.webhook_keys), key)

    def app(self, host: Host | None = None, *, poll: bool = True) -> FastAPI:
        """The application. Without `host` it reads the environment when it starts; without `poll` it takes new work on
        webhooks and at the sweep each minute only."""

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            served = host or self._of_this_process()
            latest = _Latest()
            logging.getLogger().addHandler(latest)
            settings, provider = served.settings, served.provider
            dispatcher = Dispatcher(client=open_client(settings), settings=settings, provider=provider)
            app.state.host, app.state.dispatcher, app.state.latest = served, dispatcher, latest
            stop = asyncio.Event()
            working = asyncio.create_task(worker.run(dispatcher, stop=stop, poll=poll))
            working.add_done_callback(end_with_the_worker)
            _log.info(log.line("serving", provider=provider.name))
            try:
                yield
            finally:
                stop.set()
                await dispatcher.close(CLOSE_SECONDS)
                working.cancel()
                await asyncio.wait([working])
                await provider.close()
                _log.info(log.line("stopped", provider=provider.name))
                logging.getLogger().removeHandler(latest)

        def end_with_the_worker(working: asyncio.Task[None]) -> None:
            """Without its sweep this process would look well and lose sessions: it ends, to be started again."""
            if not working.cancelled() and (error := working.exception()) is not None:
                _log.critical(log.line("failed", error=error), exc_info=error)
                app.state.failed = True
                signal.raise_signal(signal.SIGTERM)

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.state.failed = False
        app.add_api_route("/webhook", _webhook, methods=_METHODS)
        app.add_api_route("/healthz", _healthz, methods=["GET"])
        app.add_api_route("/status", _status, methods=["GET"])
        return app

    def main(self) -> int:
        """The command line. Exit codes: 0 told to stop, 1 the poller failed, 2 a setting is wrong."""
        parser = argparse.ArgumentParser(description="Serves webhooks and polls. Settings: see README.md.")
        parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
        parser.add_argument("--port", type=port, default=8080, help="the port, 0 for a free one (%(default)s)")
        parser.add_argument("--no-poll", action="store_true", help="rely on webhooks and the sweep each minute")
        options = parser.parse_args()
        log.configure()
        try:
            host = self.open(os.environ)
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            listener = socket.create_server((options.host, options.port), family=family)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (SandboxesError, OSError) as error:
            _log.error(log.line("settings", reason=str(error)))
            return 2
        app = self.app(host, poll=not options.no_poll)

        def leave(number: int, frame: FrameType | None) -> None:
            sys.exit(1 if app.state.failed else 0)

        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has shut down in order
            signal.signal(number, leave)
        address, bound = listener.getsockname()[:2]
        sys.stdout.write(f"listening on http://{address}:{bound}\n")
        sys.stdout.flush()
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=CLOSE_CONNECTIONS_SECONDS
        )
        uvicorn.Server(config).run(sockets=[listener])
        return 0

    def _of_this_process(self) -> Host:
        """For another server, which has not set up our log, and would show a wrong setting as a traceback."""
        log.configure()
        try:
            return self.open(os.environ)
        except SandboxesError as error:
            _log.error(log.line("settings", reason=str(error)))
            os._exit(2)  # as `main` does; nothing runs yet


class _Latest(logging.Handler):
    """The last lines of the log, as they were written."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=_LATEST_LINES)
        self.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


async def _webhook(request: Request) -> Response:
    """Answers at once; the work happens in the background."""
    state = request.app.state
    reply = await handler.handle(
        handler.Request(request.method, request.headers, request.stream()),
        verifier=state.host.verifier,
        wake=state.dispatcher.wake,
        suspect=state.dispatcher.suspect,
    )
    return Response(reply.body, reply.status, dict(reply.headers))


async def _healthz() -> dict[str, bool]:
    """Whether this process answers."""
    return {"ok": True}


async def _status(request: Request) -> dict[str, Any]:
    """What waits in the queue, what runs, and what this process last said. Asks Anthropic and the provider each time;
    what does not answer is null."""
    host: Host = request.app.state.host
    if host.status_key is None:
        raise HTTPException(404)
    given = request.headers.get("authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {host.status_key}".encode()):
        raise HTTPException(401, headers={"www-authenticate": "Bearer"})
    queue: Any = None
    async with open_client(host.settings) as client:
        with contextlib.suppress(AnthropicError, TimeoutError):
            async with asyncio.timeout(STATUS_SECONDS):
                queue = (await client.beta.environments.work.stats(host.settings.environment_id)).model_dump(
                    mode="json"
                )
    sandboxes: Any = None
    with contextlib.suppress(LaunchFailed, TimeoutError):
        async with asyncio.timeout(STATUS_SECONDS):
            sandboxes = [asdict(info) async for info in host.provider.sandboxes()]
    return {"queue": queue, "sandboxes": sandboxes, "log": list(request.app.state.latest.lines)}
