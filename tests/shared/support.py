"""What the tests of the host side share: a provider that starts nothing, and a way to stand between SDK and server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
from anthropic import AsyncAnthropic

from shared.dispatcher import Dispatcher
from shared.errors import LaunchFailed
from shared.provider import Launch, SandboxInfo, Started
from shared.runner_pages import RefusePages
from shared.settings import Settings
from tools.emulator import Emulator

RECLAIM_SECONDS = 121.0  # past the window in which an item that was handed out is not offered again
HEALABLE_SECONDS = 61.0  # past the wait before a stopped item is looked at

READY = Started("ready")
Start = Callable[[dict[str, str]], Awaitable[Started]]


def settings_for(emulator: Emulator, **more: str) -> Settings:
    return Settings.from_env(
        {
            "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
            "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
            "ANTHROPIC_BASE_URL": emulator.url,
            **more,
        }
    )


async def says_ready(_job: dict[str, str]) -> Started:
    return READY


class FakeSandbox:
    created = True

    def __init__(self, provider: FakeProvider, session_id: str) -> None:
        self.id = f"box-{session_id}"
        self._provider = provider

    async def start(self, launch: Launch) -> Started:
        job: dict[str, str] = json.loads(launch.stdin)
        self._provider.jobs.append(job)
        self._provider.files.append(dict(launch.files))
        return await self._provider.start(job)

    async def tail(self, lines: int) -> str:
        return ""


class FakeProvider:
    """Remembers what it was asked. `start` decides how a launch ends; what is in `broken` fails that way when asked."""

    name = "fake"

    def __init__(self, start: Start = says_ready) -> None:
        self.start = start
        self.jobs: list[dict[str, str]] = []
        self.files: list[dict[str, bytes]] = []
        self.infos: list[SandboxInfo] = []
        self.renewed: list[str] = []
        self.released: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.listed = 0

    @property
    def started(self) -> list[str]:
        return [job["ANTHROPIC_SESSION_ID"] for job in self.jobs]

    def _check(self, *names: str) -> None:
        for name in names:
            if name in self.broken:
                raise self.broken[name]

    async def acquire(self, session_id: str) -> FakeSandbox:
        self._check(session_id)
        return FakeSandbox(self, session_id)

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        self._check(sandbox_id)
        self.renewed.append(sandbox_id)

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        self.listed += 1
        self._check("sandboxes")
        for info in self.infos:
            yield info

    async def release(self, sandbox_id: str) -> None:
        self._check(sandbox_id)
        self.released.append(sandbox_id)


class HangingList(FakeProvider):
    """A provider that never says what it has."""

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        await asyncio.Event().wait()
        yield SandboxInfo("never", "never", 0, 0, running=False)


class Gate:
    """A `start` that waits until it is opened, and counts who is inside."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.entered: asyncio.Queue[str] = asyncio.Queue()
        self.inside = self.most_inside = 0

    async def __call__(self, job: dict[str, str]) -> Started:
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        self.entered.put_nowait(job["ANTHROPIC_SESSION_ID"])
        try:
            await self.opened.wait()
        finally:
            self.inside -= 1
        return READY


Answer = Callable[[httpx2.Request, httpx2.Response], "httpx2.Response | None"]


class Detour(httpx2.AsyncBaseTransport):
    """Hands every request to the server and the answer to `changes`, which may return another one."""

    def __init__(self) -> None:
        self._inner = httpx2.AsyncHTTPTransport()
        self.changes: list[Answer] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        await response.aread()
        for change in self.changes:
            response = change(request, response) or response
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()

    def answer_polls(self, *answers: httpx2.Response) -> None:
        """Answers the next polls with these; the server is asked all the same."""
        left = list(answers)
        self.changes.append(
            lambda request, _: left.pop(0) if left and request.url.path.endswith("/work/poll") else None
        )

    def change_item(self, work_id: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Changes one item in every poll that hands it out."""

        def apply(request: httpx2.Request, response: httpx2.Response) -> httpx2.Response | None:
            if (
                not request.url.path.endswith("/work/poll")
                or (item := response.json()) is None
                or item["id"] != work_id
            ):
                return None
            change(item)
            return httpx2.Response(200, json=item)

        self.changes.append(apply)

    def client(self, emulator: Emulator) -> AsyncAnthropic:
        http_client = httpx2.AsyncClient(transport=self)
        return AsyncAnthropic(
            auth_token=emulator.environment_key,
            base_url=emulator.url,
            http_client=http_client,
            middleware=[RefusePages()],
        )


def polls(emulator: Emulator) -> int:
    return sum(record.operation == "work.poll" for record in emulator.requests)


def count(emulator: Emulator, operation: str) -> int:
    return sum(record.operation == operation for record in emulator.requests)


async def until(emulator: Emulator, predicate: Callable[[], Any]) -> None:
    """Waits for the emulator's state, off the event loop."""
    await asyncio.to_thread(emulator.wait_until, predicate)


async def claim(client: AsyncAnthropic, emulator: Emulator, session_id: str, *, beat: bool = True) -> None:
    """What a runner does first: ack, then the first heartbeat."""
    work = client.beta.environments.work
    work_id = emulator.work(session_id)["id"]
    await work.ack(work_id, environment_id=emulator.environment_id)
    if beat:
        await work.heartbeat(work_id, environment_id=emulator.environment_id, expected_last_heartbeat="NO_HEARTBEAT")


def failed(*, retriable: bool = True) -> LaunchFailed:
    return LaunchFailed("asked to fail", retriable=retriable)


# --- webhooks ------------------------------------------------------------------------------------------------------


def sign(key: bytes, webhook_id: str, timestamp: str, body: bytes) -> str:
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def event_body(session_id: str = "sesn_1", type_: str = "session.status_run_started", **more: Any) -> bytes:
    data = {"type": type_, "id": session_id, "organization_id": "org_1", "workspace_id": "wrkspc_1"}
    event = {"type": "event", "id": "whe_1", "created_at": "2026-11-23T10:00:00.000000Z", "data": data, **more}
    return json.dumps(event).encode()


def signed_headers(key: bytes, body: bytes, *, webhook_id: str = "whe_1", age: float = 0) -> dict[str, str]:
    timestamp = str(int(time.time() - age))
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": sign(key, webhook_id, timestamp, body),
    }


async def chunks(*parts: bytes) -> AsyncIterable[bytes]:
    for part in parts:
        yield part


def dispatcher_for(
    emulator: Emulator,
    provider: FakeProvider,
    client: AsyncAnthropic,
    *,
    settings: dict[str, str] | None = None,
    **more: Any,
) -> Dispatcher:
    return Dispatcher(client=client, settings=settings_for(emulator, **(settings or {})), provider=provider, **more)
