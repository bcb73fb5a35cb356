"""The double as a whole: two services on one port, on a thread of their own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpclib.server
import modal
from aiohttp import web
from grpclib.protocol import H2Protocol
from modal_proto import api_pb2 as api
from modal_proto.api_grpc import ModalClientBase
from modal_proto.task_command_router_grpc import TaskCommandRouterBase

from .control import TOKEN_ID, TOKEN_SECRET
from .functions import Functions
from .router import Router
from .state import Image, Sandbox, State, Volume, new_id
from .wire import Wire, service

T = TypeVar("T")
_PATIENCE_SECONDS = 60.0


class _Server(grpclib.server.Server):
    """A server that closes its connections, too."""

    def _protocol_factory(self) -> H2Protocol:
        self.protocols: list[H2Protocol] = getattr(self, "protocols", [])
        self.protocols.append(super()._protocol_factory())
        return self.protocols[-1]

    def hang_up(self) -> None:
        for protocol in getattr(self, "protocols", []):
            protocol.processor.close()


class ModalDouble:
    """`with ModalDouble() as double:` serves until the block ends."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="modal-double-"))
        self.directory.chmod(0o755)  # what a sandbox's agent works in is below
        self.wire = Wire()
        self.state = State(self.directory)
        self.control = Functions(self.state)
        self.router = Router(self.state)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._servers: list[Any] = []
        self._clients = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._thread.start()
        self.run(self._start())
        self.client = self.new_client()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clients.close()
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Does `work` on the double's own event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_SECONDS)

    async def on_its_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """The same, from another event loop, which goes on meanwhile."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _start(self) -> None:
        services = [
            service(ModalClientBase, self.control, self.wire),
            service(TaskCommandRouterBase, self.router, self.wire),
        ]
        server = _Server(services)
        await server.start("127.0.0.1", 0)
        self._servers.append(server)
        port = server._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = self.control.url = f"http://127.0.0.1:{port}"
        application = web.Application()
        application.router.add_route("*", "/{function}{slash:/?}{path:.*}", self.control.serve)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._runner = runner
        self.control.web_url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self.control.close()
        for server in self._servers:
            server.close()
            await server.wait_closed()
            server.hang_up()
        await asyncio.sleep(0)  # the loop closes what was hung up
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    # --- for clients -------------------------------------------------------------------------------------------------

    @property
    def environ(self) -> dict[str, str]:
        """What points Modal's client and command line at this double."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": TOKEN_ID,
            "MODAL_TOKEN_SECRET": TOKEN_SECRET,
            "MODAL_CONFIG_PATH": "/nonexistent/modal.toml",
        }

    def new_client(self, secret: str = TOKEN_SECRET) -> modal.Client:
        """Modal's client, as it would make it of `environ`. Not from within an event loop."""
        client = modal.Client(self.url, api.CLIENT_TYPE_CLIENT, (TOKEN_ID, secret))
        self._clients.enter_context(client)
        return client

    # --- for tests ---------------------------------------------------------------------------------------------------

    def add_image(self, files: dict[str, Path]) -> str:
        """An image that was built before: path inside -> directory or file here. Returns its id."""
        image = Image(new_id("im"), self.directory / "images" / new_id("given"), [])
        image.root.mkdir(parents=True)
        for inside, path in files.items():
            target = image.root / inside.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, target)
        self.state.images[image.id] = image
        return image.id

    def fire(self, function: str, *arguments: Any) -> Any:
        """Calls a deployed function as its schedule would, and returns how it ended."""
        return self.run(self.control.run_until_done(function, arguments))

    def log(self, function: str) -> str:
        """What the containers of a function have printed."""
        function_id = self.control.function_id(function)
        logs = [each.log for each in self.control.containers if each.function_id == function_id]
        return "".join(log.read_text(errors="replace") for log in logs)

    def create_secret(self, name: str, **variables: str) -> None:
        """A secret that somebody made in the dashboard."""
        self.state.secret_ids[name] = new_id("st")
        self.state.secrets[self.state.secret_ids[name]] = variables

    def running(self) -> list[Sandbox]:
        return [sandbox for sandbox in self.state.sandboxes.values() if sandbox.running]

    def volume(self, name: str) -> Volume:
        return next(volume for volume in self.state.volumes.values() if volume.name == name)

    def evict(self, sandbox: Sandbox) -> None:
        """Takes a sandbox away without a word, as the loss of its machine does."""
        self.run(self.control.end(sandbox))
