"""One ASGI application on loopback, on a thread of its own. The vendors' doubles run on it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_PATIENCE_SECONDS = 60.0


class Server(uvicorn.Server):
    def __init__(self, app: ASGIApp, close: Callable[[], Awaitable[None]] | None = None) -> None:
        super().__init__(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False))
        self._close = close
        self._ready = threading.Event()
        self._leave = asyncio.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=self._serve_until_stopped, daemon=True)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        self._thread.start()
        if not self._ready.wait(_PATIENCE_SECONDS) or not self.started:
            raise RuntimeError("the server did not start; see the traceback of its thread")

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            raise RuntimeError("the server did not stop")

    def _serve_until_stopped(self) -> None:
        try:
            self.run([self._socket])
        finally:
            self._ready.set()

    def hang_up(self, request: Request) -> None:
        """Ends the connection of this request without an answer."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, H11Protocol) and connection.client == tuple(request.client or ()):
                connection.transport.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self._ready.set()

    async def main_loop(self) -> None:
        """Waits to be stopped, instead of looking ten times a second."""
        await self.on_tick(0)
        await self._leave.wait()
        for connection in list(self.server_state.connections):
            if isinstance(connection, H11Protocol):
                connection.transport.close()
        for task in list(self.server_state.tasks):
            task.cancel()
        if self._close is not None:
            await self._close()
