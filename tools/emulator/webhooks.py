"""The webhook sender: one endpoint, Standard Webhooks signatures, three attempts.

Documented: headers, body, at most three attempts with a jittered backoff of 5 to 120 s, a redirect that disables the
endpoint, nothing replayed. The response timeout is not published, so it is a parameter. Backoff runs on the emulator's
clock; the signed timestamp is real time, plus the skew, because receivers reject one that is more than five minutes
from theirs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import httpx2

from .engine import Engine
from .shown import ShownClock
from .state.ids import new_id
from .webhook_faults import WebhookFault

ATTEMPTS = 3
SHORTEST_DELAY_SECONDS = 5.0
LONGEST_DELAY_SECONDS = 120.0
TIMEOUT_SECONDS = 10.0
REDIRECTED = "auto-disabled: endpoint URL returned a redirect (3xx)"
_random = random.SystemRandom()


@dataclass(frozen=True)
class Delivery:
    """One attempt. `status` is the receiver's answer, `error` the reason there was none; `ms` is how long it took."""

    webhook_id: str
    type: str
    session_id: str
    attempt: int
    status: int | None
    error: str | None
    at: datetime
    ms: int

    @property
    def is_ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True)
class Notification:
    """A transition that a webhook tells of; `at` is the moment of the transition."""

    type: str
    session_id: str
    at: datetime
    webhook_id: str = field(default_factory=lambda: new_id("whe"))


def signing_key(key: str) -> bytes:
    """The bytes of a `whsec_` key in either base64 alphabet, padded or not; ValueError when it is none."""
    encoded = key.removeprefix("whsec_").rstrip("=").translate(str.maketrans("-_", "+/"))
    if not key.startswith("whsec_") or not encoded:
        raise ValueError("a webhook key looks like whsec_<base64>")
    return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)


def signature(key: bytes, webhook_id: str, timestamp: int, body: str) -> str:
    digest = hmac.new(key, f"{webhook_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def delay_after(attempt: int) -> float:
    """Seconds of backoff after the first or second attempt: 5 to 10, then 20 to 40."""
    base = SHORTEST_DELAY_SECONDS * 4.0 ** (attempt - 1)
    return min(LONGEST_DELAY_SECONDS, base * _random.uniform(1, 2))


class WebhookSender:
    """Delivers from the event loop; every event is a task of its own, so a slow receiver delays no other."""

    def __init__(
        self,
        engine: Engine,
        key: str,
        url: str | None,
        types: Collection[str] | None,
        timeout: float,
        on_delivery: Callable[[Delivery], None],
        shown: ShownClock,
    ) -> None:
        self._engine = engine
        self._shown = shown
        self._held: list[Notification] = []
        self.faults: list[WebhookFault] = []
        """The armed ones; the first is the next to be met."""
        self._key = signing_key(key)
        self._types = types
        self._timeout = timeout
        self._on_delivery = on_delivery
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx2.AsyncClient | None = None
        self.is_paused = False
        self.wall_time: Callable[[], float] = time.time
        self.register(url)

    def register(self, url: str | None) -> None:
        """A new endpoint, or none (ValueError for what is no http URL). It also enables again; nothing is replayed."""
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError(f"webhook URL {url!r} is not an http or https URL")
        self.url = url
        self.disabled_reason: str | None = None

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = httpx2.AsyncClient(timeout=self._timeout, follow_redirects=False, trust_env=False)

    async def close(self) -> None:
        """Give up what is not delivered: a server that is gone retries nothing."""
        self._loop = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    def notify(self, notification: Notification) -> None:
        """Start a delivery, from any thread. Without an enabled endpoint, paused or before the start it is lost."""
        is_wanted = self._types is None or notification.type in self._types
        is_enabled = self.disabled_reason is None and not self.is_paused
        if self._loop is not None and self.url is not None and is_wanted and is_enabled:
            self._loop.call_soon_threadsafe(self._dispatch, notification, self.url)

    def enable(self) -> None:
        """By hand, as in the Console; nothing is replayed."""
        self.disabled_reason = None

    def _dispatch(self, notification: Notification, url: str) -> None:
        """Send a webhook as the next fault has it. On the loop only, so they come here in the order of transitions."""
        now = self._engine.clock.now()
        fault = self.faults[0] if self.faults else None
        if fault is not None:
            fault.hits += 1
            if fault.hits >= fault.count:
                self.faults.remove(fault)
            self._engine.ring()
        match fault.kind if fault else None:
            case "lose":
                return
            case "reorder":
                self._held.append(notification)
                return
            case "delay" if fault:
                self._start(self._deliver_later(notification, url, now + timedelta(seconds=fault.seconds)))
                return
            case "duplicate":
                self._start(self._deliver(notification, url))
        if self._held:
            batch = [notification, *reversed(self._held)]
            self._held.clear()
            self._start(self._deliver_in_order(batch, url))
        else:
            self._start(self._deliver(notification, url))

    def _start(self, delivery: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(delivery)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver_later(self, notification: Notification, url: str, due: datetime) -> None:
        await self._engine.wait_for_instant(due)
        if not self._engine.is_closing:
            await self._deliver(notification, url)

    async def _deliver_in_order(self, batch: list[Notification], url: str) -> None:
        """Each is on its way once the first attempt of the one before it has been made."""
        for notification in batch:
            attempted = asyncio.Event()
            self._start(self._deliver(notification, url, attempted))
            await attempted.wait()

    async def _deliver(self, notification: Notification, url: str, attempted: asyncio.Event | None = None) -> None:
        try:
            await self._attempts(notification, url, attempted or asyncio.Event())
        finally:
            if attempted is not None:
                attempted.set()

    async def _attempts(self, notification: Notification, url: str, attempted: asyncio.Event) -> None:
        data = {"type": notification.type, "id": notification.session_id, **_OWNER}
        webhook_id = notification.webhook_id
        created_at = self._shown.moment(notification.at)
        body = json.dumps({"type": "event", "id": webhook_id, "created_at": created_at, "data": data})
        for attempt in range(1, ATTEMPTS + 1):
            if self.disabled_reason is not None or self.url != url:
                return
            delivery = await self._attempt(notification, webhook_id, url, body, attempt)
            self._on_delivery(delivery)
            attempted.set()
            if delivery.is_ok:
                return
            if delivery.status is not None and 300 <= delivery.status < 400:
                self.disabled_reason = REDIRECTED
                return
            if attempt < ATTEMPTS:
                due = delivery.at + timedelta(milliseconds=delivery.ms, seconds=delay_after(attempt))
                await self._engine.wait_for_instant(due)
                if self._engine.is_closing:
                    return

    async def _attempt(
        self, notification: Notification, webhook_id: str, url: str, body: str, attempt: int
    ) -> Delivery:
        assert self._client is not None  # noqa: S101 - tasks start after open()
        timestamp = self._shown.wall_seconds(self.wall_time())
        headers = {
            "content-type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._key, webhook_id, timestamp, body),
        }
        at = self._engine.clock.now()
        started = time.monotonic()
        status: int | None = None
        error: str | None = None
        try:
            response = await self._client.post(url, content=body, headers=headers)
            status = response.status_code
        except httpx2.HTTPError as failure:
            error = type(failure).__name__
        ms = round((time.monotonic() - started) * 1000)
        return Delivery(webhook_id, notification.type, notification.session_id, attempt, status, error, at, ms)


_OWNER = {"organization_id": "org_emulator", "workspace_id": "wrkspc_emulator"}
