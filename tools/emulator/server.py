"""The HTTP server: uvicorn on a thread of its own, on loopback, on a free port unless one is asked for."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from .engine import Engine
from .webhooks import WebhookSender

STOP_SECONDS = 10.0
GRACE_SECONDS = 5.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Server(uvicorn.Server):
    def __init__(self, app: Starlette, engine: Engine, webhooks: WebhookSender, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,  # the date comes from the emulator's clock
        )
        super().__init__(config)
        self._engine = engine
        self._webhooks = webhooks
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()
        # Bound before the thread starts: the port is known at once, and one that is taken fails in the caller.
        self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer waits for no earlier one's ack
        self._thread = threading.Thread(target=self.run, args=([self._socket],), name="emulator", daemon=True)
        address = f"[{host}]" if ":" in host else host
        self.url = f"http://{address}:{self._socket.getsockname()[1]}"

    def start(self) -> None:
        self._thread.start()
        if not self._ready.wait(STOP_SECONDS):
            raise RuntimeError("the emulator did not start; see the traceback of its thread")

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            raise RuntimeError("the emulator did not stop")

    def hang_up(self, client: tuple[str, int]) -> None:
        """End the connection of this client without another word. On the loop only."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, H11Protocol) and connection.client == client:
                connection.transport.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._engine.open(self._loop)
        await self._webhooks.open()
        self._time_keeper = asyncio.create_task(self._engine.keep_time())
        self._ready.set()

    async def main_loop(self) -> None:
        """Wait to be stopped, instead of looking ten times a second."""
        await self.on_tick(0)
        await self._leave.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.close()
        await self._webhooks.close()
        await self._time_keeper
        await self._end_connections(sockets or [])
        self._engine.detach()

    async def _end_connections(self, sockets: list[socket.socket]) -> None:
        """What uvicorn does at its end, but for its naps of 0.1 s: tests start and stop emulators by the hundred."""
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self.server_state.tasks:
            _, late = await asyncio.wait(set(self.server_state.tasks), timeout=GRACE_SECONDS)
            for task in late:
                task.cancel()
        deadline = time.monotonic() + GRACE_SECONDS
        # A closing transport tells of its end in one of the loop's next turns, and uvicorn tells nobody.
        while self.server_state.connections and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for server in self.servers:
            await server.wait_closed()
