"""A proxy between the real SDK and the real emulator that loses, refuses or holds back single requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from urllib.parse import urlsplit

OPERATIONS = {
    "ack": r"POST .*/work/[^/]+/ack$",
    "beat": r"POST .*/work/[^/]+/heartbeat$",
    "stop": r"POST .*/work/[^/]+/stop$",
    "session": r"GET /v1/sessions/[^/]+$",
    "stream": r"GET .*/events/stream$",
    "list": r"GET .*/events$",
    "send": r"POST .*/events$",
    "skill": r"GET /v1/skills/.*",
    "memories": r"GET .*/memories$",
    "memory": r"POST .*/memories/.*",
}


@dataclass
class Fault:
    """What happens to the next requests of one operation."""

    operation: str
    kind: Literal["lose", "spoil", "empty", "drop", "answer", "hold"]
    times: float
    status: int = 500
    body: dict[str, Any] = field(default_factory=dict)
    is_answered: bool = True
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """A request has met this fault."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    """Requests that were held go on."""


class Proxy:
    """One request a connection. Faults apply in the order they were asked for."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self._faults: list[Fault] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.seen: list[str] = []
        """The operations in the order in which they came in, also those that went no further."""
        self.changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def lose(self, operation: str, times: float = 1) -> Fault:
        """Recorded by the emulator, but its answer never arrives."""
        return self._add(Fault(operation, "lose", times))

    def spoil(self, operation: str, status: int) -> Fault:
        """Recorded by the emulator, and answered with this status."""
        return self._add(Fault(operation, "spoil", 1, status))

    def empty(self, operation: str) -> Fault:
        """Recorded by the emulator, and answered with 200 and nothing."""
        return self._add(Fault(operation, "empty", 1))

    def drop(self, operation: str, times: float = 1) -> Fault:
        """Never reaches the emulator."""
        return self._add(Fault(operation, "drop", times))

    def answer(self, operation: str, status: int, times: float = 1, body: dict[str, Any] | None = None) -> Fault:
        """Answered with this status; never reaches the emulator."""
        return self._add(Fault(operation, "answer", times, status, body or {}))

    def hold(self, operation: str, times: float = 1, *, is_answered: bool = True) -> Fault:
        """Goes on once the fault's `released` is set; the answer may be lost then."""
        return self._add(Fault(operation, "hold", times, is_answered=is_answered))

    def clear(self) -> None:
        self._faults.clear()

    def count(self, operation: str) -> int:
        return self.seen.count(operation)

    async def wait_count(self, operation: str, count: int) -> None:
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: self.count(operation) >= count)

    def _add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._relay(reader, writer)
        finally:
            await _close(writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"(?i)^content-length: (\d+)", head, re.MULTILINE)
        body = await reader.readexactly(int(length[1])) if length else b""
        method, target, _ = head.split(" ", 2)
        fault = await self._note(f"{method} {target.partition('?')[0]}")
        kind = fault.kind if fault is not None else "none"
        if fault is not None and kind == "hold":
            await fault.released.wait()
        if fault is not None and kind == "answer":
            writer.write(_reply(fault.status, fault.body))
        elif kind != "drop":
            async with contextlib.aclosing(self._forward(head, body)) as chunks:
                async for chunk in chunks:
                    if kind not in ("lose", "spoil", "empty") and (fault is None or fault.is_answered):
                        writer.write(chunk)
                        await writer.drain()
        if fault is not None and kind == "spoil":
            writer.write(_reply(fault.status, fault.body))
        if kind == "empty":
            nothing = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 0\r\n"
            writer.write(f"{nothing}connection: close\r\n\r\n".encode())
        await writer.drain()

    async def _note(self, what: str) -> Fault | None:
        operation = next((name for name, pattern in OPERATIONS.items() if re.match(pattern, what)), what)
        fault = next((each for each in self._faults if each.operation == operation and each.times > 0), None)
        if fault is not None:
            fault.times -= 1
            fault.reached.set()
        async with self.changed:
            self.seen.append(operation)
            self.changed.notify_all()
        return fault

    async def _forward(self, head: str, body: bytes) -> AsyncGenerator[bytes, None]:
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        try:
            lines = [line for line in head.split("\r\n") if line and not line.lower().startswith("connection:")]
            writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1") + body)
            await writer.drain()
            while chunk := await reader.read(65536):
                yield chunk
        finally:
            await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def _reply(status: int, body: dict[str, Any]) -> bytes:
    content = json.dumps(body or {"type": "error", "error": {"type": "api_error", "message": "a fault"}}).encode()
    head = f"HTTP/1.1 {status} Fault\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + content
