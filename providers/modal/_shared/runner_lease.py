"""The lease of one work item, and the middleware through which every request of the SDK's worker passes (R1, R2, R4).

The SDK's worker starts its heartbeat beside the tools, begins it with NO_HEARTBEAT, and force-stops the item on almost
any exit. Its public hook, `AsyncAnthropic(middleware=[...])`, sees every HTTP attempt. So the runner claims by itself,
and the middleware carries that claim on: it puts our last heartbeat into every beat, learns from every answer what the
lease is worth, lets a stop through only when `may_stop` agrees, keeps results back that must not be sent as they are,
and notes every event that the worker gets (`EventLog`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast

from anthropic import APIRequest, AsyncAPIResponse, Middleware
from anthropic.types.beta.environments import BetaSelfHostedWork, BetaSelfHostedWorkHeartbeatResponse
from anthropic.types.beta.sessions import BetaManagedAgentsSendSessionEvents

from . import runner_clock
from .runner_events import EventLog, HeardStream
from .runner_lock import LeaseState

NO_HEARTBEAT = "NO_HEARTBEAT"
DEFAULT_TTL_SECONDS = 300.0  # until the server's first answer; its own default
FRESH_MARGIN_SECONDS = 60.0  # no call starts in the last minute of a lease (R5)
REFUSED = (401, 403, 404)  # the credential or the item is gone: no later request will fare better
UNDECIDED = (408, 409, 429)  # of the 4xx, those worth another attempt
_LOOK_SECONDS = 1.0

CallNext = Callable[[Any], Awaitable[AsyncAPIResponse[Any]]]


class Lease:
    """What this runner knows of its lease. One writer: the middleware (and the first claim).

    A beat counts from the moment it was sent: the server's time to live began no earlier.
    """

    def __init__(self, on_beat: Callable[[str], None], now: Callable[[], float] = runner_clock.now) -> None:
        self.now = now
        self.ttl_seconds = DEFAULT_TTL_SECONDS
        self.last_heartbeat: str | None = None
        self.unknown_since: float | None = None
        """When the first beat was sent whose answer was never seen: it may have been recorded (R2)."""
        self.lost = asyncio.Event()
        self.stopping = asyncio.Event()
        """The server said stopping or stopped. The item is to be stopped, whatever is open."""
        self.stop_sent = False
        """A stop of ours, at the end of a turn, may have been recorded, whether its answer was seen or not: what the
        server calls stopped since then is no operator's doing."""
        self._beaten_at = now()
        self._beat = asyncio.Event()
        self._on_beat = on_beat

    def beaten(self, last_heartbeat: str, ttl_seconds: float, sent_at: float) -> None:
        """A beat of ours was recorded."""
        self.last_heartbeat = last_heartbeat
        self.ttl_seconds = ttl_seconds or self.ttl_seconds
        self.unknown_since = None
        self.stop_sent = False
        self._beaten_at = sent_at
        self._beat.set()
        self._on_beat(last_heartbeat)

    @property
    def age_seconds(self) -> float:
        """Seconds since the last beat that was recorded, by a clock that counts suspended time."""
        return self.now() - self._beaten_at

    @property
    def fresh(self) -> bool:
        """True while a tool may start: the lease will surely outlive the start (R5)."""
        margin = min(FRESH_MARGIN_SECONDS, self.ttl_seconds / 2)
        is_ours = not (self.lost.is_set() or self.stop_sent)
        return is_ours and self.age_seconds < self.ttl_seconds - margin

    async def wait_fresh(self, *unless: asyncio.Event) -> None:
        """Returns once a tool may start, or once one of `unless` is set."""
        while not self.fresh and not any(event.is_set() for event in unless):
            self._beat.clear()
            await first_of(self._beat.wait(), *(event.wait() for event in unless))

    async def watch(self) -> None:
        """Loses the lease once no beat was recorded for its whole time: the server may have given it away. Looks often,
        because a sleep does not count the time a machine was suspended."""
        while not self.lost.is_set():
            left = self.ttl_seconds - self.age_seconds
            if left <= 0:
                self.lost.set()
            else:
                await asyncio.sleep(min(left, _LOOK_SECONDS))


class LeaseMiddleware(Middleware):
    """Every HTTP attempt of the SDK's worker. `may_stop` is asked before a stop is let through (R4)."""

    def __init__(self, lease: Lease, may_stop: Callable[[], Awaitable[bool]], log: EventLog) -> None:
        self._lease = lease
        self._log = log
        self._may_stop = may_stop
        self.hold_results = False
        self.held: list[dict[str, Any]] = []
        self.stopped = False

    async def handle_async(self, request: APIRequest, call_next: CallNext) -> Any:
        kind = _kind(request.method, request.url)
        if kind == "heartbeat":
            return await self._heartbeat(request, call_next)
        if kind == "stop":
            return await self._stop(request, call_next)
        if kind == "send":
            return await self._send(request, call_next)
        response = await call_next(request)
        if kind in ("list", "stream") and response.status_code == 200:
            return await self._hear(kind, response)
        return response

    async def _heartbeat(self, request: APIRequest, call_next: CallNext) -> Any:
        lease = self._lease
        if lease.last_heartbeat is not None:  # R1: each pass of the SDK's worker begins with NO_HEARTBEAT again
            request = request.copy(
                params={**request.query_params, "expected_last_heartbeat": lease.last_heartbeat},
            )
        sent_at, unknown_since = lease.now(), lease.unknown_since
        lease.unknown_since = sent_at if unknown_since is None else unknown_since
        response = await call_next(request)
        if response.status_code < 500 and response.status_code != 408:  # a proxy's, of what may have arrived
            lease.unknown_since = unknown_since
        if response.status_code == 200:
            note_beat(lease, await response.parse(), sent_at)
        elif response.status_code == 412:
            current = lease_state(await _json(response))
            if unknown_since is not None and self._may_adopt(current):
                lease.beaten(str(current.last_heartbeat), lease.ttl_seconds, unknown_since)
                return BetaSelfHostedWorkHeartbeatResponse(
                    type="work_heartbeat",
                    last_heartbeat=str(current.last_heartbeat),
                    lease_extended=True,
                    state="active",
                    ttl_seconds=int(lease.ttl_seconds),
                )
            lease.lost.set()
        elif 400 <= response.status_code < 500 and response.status_code not in UNDECIDED:
            lease.lost.set()  # the SDK gives up on it, too, and would stop the item
        return response

    def _may_adopt(self, current: LeaseState) -> bool:
        """R2: after a beat with an unknown outcome a 412 is ambiguous. While our lease is alive nobody else can have
        claimed it, so the value the server has is that beat."""
        return bool(
            current.state == "active" and current.last_heartbeat and self._lease.age_seconds < self._lease.ttl_seconds
        )

    async def _stop(self, request: APIRequest, call_next: CallNext) -> Any:
        # The SDK's client repeats a stop that met a 409; by then the item may be queued again, for somebody else.
        if self.stopped or not await self._may_stop():
            return BetaSelfHostedWork.model_construct()
        self._lease.stop_sent |= not self._lease.stopping.is_set()
        response = await call_next(request)
        self.stopped = response.status_code in (200, 204, 409)
        return response

    async def _hear(self, kind: str, response: AsyncAPIResponse[Any]) -> Any:
        heard = await response.parse()
        if kind == "stream":
            return HeardStream(heard, self._log)
        for event in heard.data:
            self._log.note(event)
        if not heard.has_next_page():
            self._log.is_read = True
            self._log.readings += 1
        heard.data = [event for event in heard.data if not self._log.is_settled(event)]
        return heard

    async def _send(self, request: APIRequest, call_next: CallNext) -> Any:
        if self._lease.lost.is_set():  # R5: another runner answers now
            return BetaManagedAgentsSendSessionEvents(data=[])
        if self.hold_results or self._lease.stopping.is_set():
            self.held += cast("dict[str, Any]", request.json)["events"]
            return BetaManagedAgentsSendSessionEvents(data=[])
        return await call_next(request)


def note_beat(lease: Lease, beat: BetaSelfHostedWorkHeartbeatResponse, sent_at: float) -> None:
    """Takes in one answered heartbeat. While an item is stopping the server compares nothing, so we do (P10)."""
    if beat.state not in ("stopping", "stopped") and beat.lease_extended:
        lease.beaten(beat.last_heartbeat, beat.ttl_seconds, sent_at)
    elif lease.unknown_since is None and beat.last_heartbeat not in ("", lease.last_heartbeat):
        lease.lost.set()
    else:
        lease.stop_sent &= beat.state == "stopped"  # ours is by force
        lease.stopping.set()


def lease_state(body: object) -> LeaseState:
    """`error.details.current_state` of a 412, as far as it is there."""
    node = body
    for key in ("error", "details", "current_state"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return LeaseState("unknown", None)
    last = node.get("last_heartbeat")
    return LeaseState(str(node.get("state")), last if isinstance(last, str) and last else None)


async def first_of(*waits: Any) -> None:
    """Returns when one of `waits` is done. A task among them goes on; a coroutine among them does not."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()


async def _json(response: AsyncAPIResponse[Any]) -> object:
    try:
        return json.loads(await response.http_response.aread())
    except ValueError:
        return None


def _kind(method: str, url: str) -> Literal["heartbeat", "stop", "send", "list", "stream", "other"]:
    path = url.partition("?")[0].rstrip("/")
    if method.lower() == "post":
        if "/work/" in path and path.endswith("/heartbeat"):
            return "heartbeat"
        if "/work/" in path and path.endswith("/stop"):
            return "stop"
        if "/sessions/" in path and path.endswith("/events"):
            return "send"
    elif "/sessions/" in path and path.endswith("/events"):
        return "list"
    elif "/sessions/" in path and path.endswith("/events/stream"):
        return "stream"
    return "other"
