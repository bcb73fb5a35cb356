"""The lease of one work item, and the middleware through which every request of the SDK's worker passes (R1, R2, R4).

The SDK's worker starts its heartbeat beside the tools, begins it with NO_HEARTBEAT, and force-stops the item on almost
any exit. Its public hook, `AsyncAnthropic(middleware=[...])`, sees every HTTP attempt. So the runner claims by itself,
and the middleware carries that claim on: it replaces the SDK's NO_HEARTBEAT, learns from every answer what the lease is
worth, lets a stop through only when `may_stop` agrees, and keeps results back once they must not be sent as they are.
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
from .runner_lock import LeaseState

NO_HEARTBEAT = "NO_HEARTBEAT"
DEFAULT_TTL_SECONDS = 300.0  # until the server's first answer; its own default
FRESH_MARGIN_SECONDS = 60.0  # no call starts in the last minute of a lease (R5)


class Lease:
    """What this runner knows of its lease. One writer: the middleware (and the first claim)."""

    def __init__(self, on_beat: Callable[[str], None]) -> None:
        self.ttl_seconds = DEFAULT_TTL_SECONDS
        self.last_heartbeat: str | None = None
        self.outcome_unknown = False
        """A beat was sent and its answer never seen: it may have been recorded (R2)."""
        self.lost = asyncio.Event()
        self.stopping = asyncio.Event()
        """The server said stopping or stopped: an operator's stop. The item is to be stopped, whatever is open."""
        self._beaten_at = 0.0
        self._beat = asyncio.Event()
        self._on_beat = on_beat

    def beaten(self, last_heartbeat: str, ttl_seconds: float) -> None:
        """A beat of ours was recorded."""
        self.last_heartbeat = last_heartbeat
        self.ttl_seconds = ttl_seconds or self.ttl_seconds
        self.outcome_unknown = False
        self._beaten_at = runner_clock.now()
        self._beat.set()
        self._on_beat(last_heartbeat)

    @property
    def age_seconds(self) -> float:
        """Seconds since the last beat that was answered, by a clock that counts suspended time."""
        return runner_clock.now() - self._beaten_at

    @property
    def fresh(self) -> bool:
        """True while a tool may start: the lease will surely outlive the start (R5)."""
        margin = min(FRESH_MARGIN_SECONDS, self.ttl_seconds / 2)
        return not self.lost.is_set() and self.age_seconds < self.ttl_seconds - margin

    async def wait_fresh(self) -> None:
        """Returns once a tool may start, or once the lease is lost."""
        while not self.fresh and not self.lost.is_set():
            self._beat.clear()
            waits = [asyncio.ensure_future(self._beat.wait()), asyncio.ensure_future(self.lost.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()


class LeaseMiddleware(Middleware):
    """Every HTTP attempt of the SDK's worker. `may_stop` is asked before a stop is let through (R4)."""

    def __init__(self, lease: Lease, may_stop: Callable[[], Awaitable[bool]]) -> None:
        self._lease = lease
        self._may_stop = may_stop
        self.hold_results = False
        self.held: list[dict[str, Any]] = []
        self.stop_refused = False
        self.stopped = False

    async def handle_async(
        self, request: APIRequest, call_next: Callable[[Any], Awaitable[AsyncAPIResponse[Any]]]
    ) -> Any:
        kind = _kind(request.method, request.url)
        if kind == "heartbeat":
            return await self._heartbeat(request, call_next)
        if kind == "stop":
            return await self._stop(request, call_next)
        if kind == "send":
            return await self._send(request, call_next)
        return await call_next(request)

    async def _heartbeat(
        self, request: APIRequest, call_next: Callable[[Any], Awaitable[AsyncAPIResponse[Any]]]
    ) -> Any:
        lease = self._lease
        if request.query_params.get("expected_last_heartbeat") == NO_HEARTBEAT and lease.last_heartbeat:
            params = {**request.query_params, "expected_last_heartbeat": lease.last_heartbeat}
            request = request.copy(params=params)
        was_unknown, lease.outcome_unknown = lease.outcome_unknown, True
        response = await call_next(request)
        if response.status_code < 500:
            lease.outcome_unknown = was_unknown
        if response.status_code == 200:
            note_beat(lease, await response.parse())
        elif response.status_code == 412:
            current = lease_state(await _json(response))
            if was_unknown and self._may_adopt(current):
                lease.beaten(str(current.last_heartbeat), lease.ttl_seconds)
                return BetaSelfHostedWorkHeartbeatResponse(
                    type="work_heartbeat",
                    last_heartbeat=str(current.last_heartbeat),
                    lease_extended=True,
                    state="active",
                    ttl_seconds=int(lease.ttl_seconds),
                )
            lease.lost.set()
        return response

    def _may_adopt(self, current: LeaseState) -> bool:
        """R2: after a beat with an unknown outcome a 412 is ambiguous. While our lease is alive nobody else can have
        claimed it, so the value the server has is that beat."""
        return bool(
            current.state == "active" and current.last_heartbeat and self._lease.age_seconds < self._lease.ttl_seconds
        )

    async def _stop(self, request: APIRequest, call_next: Callable[[Any], Awaitable[AsyncAPIResponse[Any]]]) -> Any:
        if not await self._may_stop():
            self.stop_refused = True
            return BetaSelfHostedWork.model_construct()
        response = await call_next(request)
        self.stopped = response.status_code in (200, 204, 409)
        return response

    async def _send(self, request: APIRequest, call_next: Callable[[Any], Awaitable[AsyncAPIResponse[Any]]]) -> Any:
        if self._lease.lost.is_set():  # R5: another runner answers now
            return BetaManagedAgentsSendSessionEvents(data=[])
        if self.hold_results:
            self.held += cast("dict[str, Any]", request.json)["events"]
            return BetaManagedAgentsSendSessionEvents(data=[])
        return await call_next(request)


def note_beat(lease: Lease, beat: BetaSelfHostedWorkHeartbeatResponse) -> None:
    """Takes in one answered heartbeat."""
    if beat.state in ("stopping", "stopped") or not beat.lease_extended:
        lease.stopping.set()
    else:
        lease.beaten(beat.last_heartbeat, beat.ttl_seconds)


def lease_state(body: object) -> LeaseState:
    """`error.details.current_state` of a 412, as far as it is there."""
    node = body
    for key in ("error", "details", "current_state"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return LeaseState("unknown", None)
    last = node.get("last_heartbeat")
    return LeaseState(str(node.get("state")), last if isinstance(last, str) and last else None)


async def _json(response: AsyncAPIResponse[Any]) -> object:
    try:
        return json.loads(await response.http_response.aread())
    except ValueError:
        return None


def _kind(method: str, url: str) -> Literal["heartbeat", "stop", "send", "other"]:
    path = url.partition("?")[0].rstrip("/")
    if method.lower() == "post":
        if "/work/" in path and path.endswith("/heartbeat"):
            return "heartbeat"
        if "/work/" in path and path.endswith("/stop"):
            return "stop"
        if "/sessions/" in path and path.endswith("/events"):
            return "send"
    return "other"
