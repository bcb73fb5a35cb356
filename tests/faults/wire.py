"""The network of a schedule: requests reach the emulator's application in the same loop, and some go wrong.

What the server does with a request happens in nobody's process: a client that dies in mid-request changes nothing
about it. A client that is suspended finds its answers when it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx2
from starlette.requests import ClientDisconnect

from tests.faults.loop import CURRENT, Process, VirtualLoop
from tests.faults.numbers import number

Kind = Literal[
    "lose_request",
    "lose_response",
    "reset_request",
    "reset_response",
    "delay_request",
    "delay",
    "fail",
    "duplicate",
]
BASE_URL = "http://control-plane"
_OPERATIONS = (
    ("work.poll", "GET", r"/v1/environments/[^/]+/work/poll"),
    ("work.list", "GET", r"/v1/environments/[^/]+/work"),
    ("work.ack", "POST", r"/v1/environments/[^/]+/work/[^/]+/ack"),
    ("work.heartbeat", "POST", r"/v1/environments/[^/]+/work/[^/]+/heartbeat"),
    ("work.stop", "POST", r"/v1/environments/[^/]+/work/[^/]+/stop"),
    ("sessions.get", "GET", r"/v1/sessions/[^/]+"),
    ("events.send", "POST", r"/v1/sessions/[^/]+/events"),
    ("events.list", "GET", r"/v1/sessions/[^/]+/events"),
    ("skills.version", "GET", r"/v1/skills/[^/]+/versions/[^/]+"),
    ("skills.content", "GET", r"/v1/skills/[^/]+/versions/[^/]+/content"),
    ("events.stream", "GET", r"/v1/sessions/[^/]+/events/stream"),
)
OPERATIONS = tuple(name for name, _, _ in _OPERATIONS)
_MATCHERS = [(name, method, re.compile(path + r"\Z")) for name, method, path in _OPERATIONS]


def operation_of(method: str, path: str) -> str:
    for name, wanted, matcher in _MATCHERS:
        if method == wanted and matcher.match(path):
            return name
    return "other"


@dataclass
class Fault:
    """What happens to the next `count` requests of one operation, of runners, of dispatchers or of both.

    `lose_…`: nothing is heard any more. `reset_…`: the connection breaks. `…_request`: before the server has got it.
    `duplicate`: carried out twice, as when something on the way repeats it; the second answer is heard.
    """

    operation: str
    kind: Kind
    count: int = 1
    who: Literal["runner", "dispatcher", "anybody"] = "anybody"
    seconds: float = 0.0
    status: int = 500


@dataclass
class Asked:
    """One request, for the invariants. `status` is None until the server has answered, heard or not."""

    at: float
    process: Process
    operation: str
    path: str
    query: str
    body: bytes
    bearer: str
    status: int | None = None
    answer: bytes = b""


@dataclass(frozen=True)
class Hit:
    """A request has met a fault."""

    at: float
    process: Process
    operation: str
    fault: Fault


@dataclass
class Network:
    """What all wires of a schedule share."""

    loop: VirtualLoop
    app: Callable[..., Any]
    seed: int
    faults: list[Fault] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    on_asked: Callable[[Asked], None] = lambda asked: None
    """Called just before the server looks at a request."""
    on_answered: Callable[[Asked], None] = lambda asked: None
    """Called with what the server has answered, whoever hears it."""
    streams: list[tuple[str, Body]] = field(default_factory=list)
    server: contextvars.Context = field(default_factory=contextvars.copy_context)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    crashes: list[str] = field(default_factory=list)

    def fault_for(self, process: Process, operation: str) -> Fault | None:
        who = process.name.partition(" ")[0]
        for fault in self.faults:
            if fault.operation in (operation, "*") and fault.who in (who, "anybody"):
                fault.count -= 1
                self.hits.append(Hit(self.loop.time(), process, operation, fault))
                if fault.count <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    def cut(self, session_id: str | None) -> None:
        """Breaks the open event streams of a session, or all."""
        for path, body in list(self.streams):
            if session_id is None or f"/{session_id}/" in path:
                body.break_off()

    def run(self, main: Any) -> asyncio.Task[None]:
        task = self.loop.create_task(main, context=self.server.copy())
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.crashes.append(f"the control plane itself failed: {error!r}")

    async def close(self) -> None:
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Body(httpx2.AsyncByteStream):
    """The body of an event stream, as it arrives."""

    def __init__(self, network: Network, path: str, timeout: float | None) -> None:
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._timeout = timeout
        self._network = network
        self._entry = (path, self)
        self._is_broken = False
        self.server: asyncio.Task[None] | None = None
        network.streams.append(self._entry)

    def put(self, chunk: bytes | None) -> None:
        self._chunks.put_nowait(chunk)

    def break_off(self) -> None:
        self._is_broken = True
        self.put(None)
        self.hang_up()

    def hang_up(self) -> None:
        if self._entry in self._network.streams:
            self._network.streams.remove(self._entry)
        if self.server is not None:
            self.server.cancel()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    chunk = await self._chunks.get()
            except TimeoutError:
                raise httpx2.ReadTimeout("the stream is silent") from None
            if chunk is None:
                if self._is_broken:
                    raise httpx2.ReadError("the stream was cut")
                return
            yield chunk

    async def aclose(self) -> None:
        self.hang_up()


class Wire(httpx2.AsyncBaseTransport):
    """The network as one process sees it."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process
        self._counts: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self._process.is_reaped:
            raise httpx2.ConnectError("the process is over", request=request)
        path = request.url.path
        operation = operation_of(request.method, path)
        self._counts[operation] += 1
        seed = (self._network.seed, self._process.name, operation, self._counts[operation])
        asked = Asked(
            at=self._network.loop.time(),
            process=self._process,
            operation=operation,
            path=path,
            query=request.url.query.decode(),
            body=await request.aread(),
            bearer=request.headers.get("authorization", "").removeprefix("Bearer "),
        )
        fault = self._network.fault_for(self._process, operation)
        timeout = request.extensions.get("timeout", {}).get("read")
        heard: asyncio.Future[httpx2.Response | None] = self._network.loop.create_future()
        exchange = Exchange(self._network, asked, fault, heard, number(*seed), timeout)
        self._network.run(exchange.carry_out(request))
        try:
            async with asyncio.timeout(timeout):
                response = await heard
        except TimeoutError:
            raise httpx2.ReadTimeout("no answer", request=request) from None
        if response is None:
            raise httpx2.ReadError("the connection was reset", request=request)
        return response


class Exchange:
    """One request on its way to the server, and the answer on its way back."""

    def __init__(
        self,
        network: Network,
        asked: Asked,
        fault: Fault | None,
        heard: asyncio.Future[httpx2.Response | None],
        luck: float,
        timeout: float | None,
    ) -> None:
        self._network = network
        self._asked = asked
        self._kind = fault.kind if fault else None
        self._fault = fault or Fault("", "fail")
        self._heard = heard
        self._seconds = 0.004 + luck * 0.06  # one way; no two requests take exactly the same
        self._timeout = timeout
        self._content: list[bytes] = []
        self._start: dict[str, Any] = {}
        self._body: Body | None = None

    async def carry_out(self, request: httpx2.Request) -> None:
        await asyncio.sleep(self._seconds + (self._fault.seconds if self._kind == "delay_request" else 0.0))
        if self._kind == "lose_request":
            return
        if self._kind == "reset_request":
            self._hear(None)
            return
        if self._kind == "fail":
            error = {"type": "error", "error": {"type": "api_error", "message": "injected"}, "request_id": "req_0"}
            self._hear(httpx2.Response(self._fault.status, json=error, request=request))
            return
        if self._kind == "duplicate" and self._asked.operation != "events.stream":
            first = replace(self._asked)
            unheard = Exchange(self._network, first, None, self._network.loop.create_future(), 0.0, self._timeout)
            await unheard.carry_out(request)
        self._network.on_asked(self._asked)
        self._request = request
        with contextlib.suppress(ClientDisconnect):
            await self._network.app(self._scope(request), self._receive, self._send)
        if self._body is not None:
            self._body.put(None)
            self._body.hang_up()

    def _scope(self, request: httpx2.Request) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.url.path,
            "raw_path": request.url.raw_path,
            "root_path": "",
            "query_string": request.url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "server": ("control-plane", 80),
            "client": (self._asked.process.name, self._asked.process.pid),
        }

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self._asked.body, "more_body": False}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if self._asked.operation == "events.stream" and message["status"] == 200:
                await self._open_stream()
            return
        if self._body is not None:
            await asyncio.sleep(self._seconds)
            self._body.put(message.get("body", b""))
            return
        self._content.append(message.get("body", b""))
        if not message.get("more_body"):
            await self._answer()

    async def _answer(self) -> None:
        self._asked.status = self._start["status"]
        self._asked.answer = b"".join(self._content)
        self._network.on_answered(self._asked)
        await asyncio.sleep(self._seconds + (self._fault.seconds if self._kind == "delay" else 0.0))
        if self._kind == "lose_response":
            return
        if self._kind == "reset_response":
            self._hear(None)
            return
        headers = self._start["headers"]
        self._hear(httpx2.Response(self._asked.status or 0, headers=headers, content=self._asked.answer))

    async def _open_stream(self) -> None:
        await asyncio.sleep(self._seconds + (self._fault.seconds if self._kind == "delay" else 0.0))
        if self._kind in ("lose_response", "reset_response"):
            if self._kind == "reset_response":
                self._hear(None)
            raise OSError("nobody reads this stream")
        self._body = Body(self._network, self._asked.path, self._timeout)
        self._body.server = asyncio.current_task()
        self._asked.process.on_death.append(self._body.hang_up)
        self._hear(httpx2.Response(200, headers=self._start["headers"], stream=self._body))

    def _hear(self, response: httpx2.Response | None) -> None:
        if not self._heard.done():
            self._heard.set_result(response)


def client_for(network: Network, process: Process) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=Wire(network, process), base_url=BASE_URL, trust_env=False)


def current_process() -> Process:
    process = CURRENT.get()
    assert process is not None, "asked outside of every process"
    return process
