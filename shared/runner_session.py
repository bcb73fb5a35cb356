"""One session under one lease: claim, serve, leave (R4, R6).

The SDK's `EnvironmentWorker.handle_item` does the serving. Around it stand the claim before it starts, the question
whether its stop may go through, and what happens on SIGTERM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
from anthropic import AsyncAnthropic
from anthropic.lib.environments import EnvironmentWorker

from . import runner_process
from .runner_claim import NotOurs, ack_and_claim, beat, open_api
from .runner_job import EXIT_HANDED_OVER, EXIT_LEASE_LOST, EXIT_OK, RunnerJob
from .runner_lease import NO_HEARTBEAT, Lease, LeaseMiddleware
from .runner_lock import Lock
from .runner_tools import Guard, ToolFactory

HANDOVER_SECONDS = 20.0  # for the SDK's teardown after SIGTERM: memory flush, stop
SETUP_ATTEMPTS = 3
SETUP_PAUSE_SECONDS = 2.0
_REAP_SECONDS = 5.0
_RECENT_EVENTS = 100

Emit = Callable[..., None]
Exit = tuple[int, str]


class Session:
    """Serves one job. `leaving` is set by SIGTERM."""

    def __init__(self, job: RunnerJob, *, lock: Lock, leaving: asyncio.Event, workdir: Path, emit: Emit) -> None:
        self._job = job
        self._lock = lock
        self._leaving = leaving
        self._workdir = workdir
        self._emit = emit
        self._api = open_api(job)
        self._lease = Lease(on_beat=lambda beat: lock.say("claimed", beat))
        self._giving_up = False
        self._middleware = LeaseMiddleware(self._lease, self._may_stop)
        self._client = open_api(job, middleware=[self._middleware], max_retries=2, timeout=60.0)

    async def run(self, custom_tools: ToolFactory) -> Exit:
        """From the ack to the exit code."""
        began = time.monotonic()
        try:
            await ack_and_claim(self._api, self._job, self._lease)
        except NotOurs as refused:
            return EXIT_LEASE_LOST, str(refused)
        self._emit("claimed", session=self._job.session_id, ms=round((time.monotonic() - began) * 1000))
        reaper = asyncio.create_task(_reap_for_ever())
        try:
            return await self._serve(custom_tools)
        finally:
            reaper.cancel()
            runner_process.kill_descendants()

    # --- R4: serve until a stop may go through ---------------------------------------------------------------------

    async def _serve(self, custom_tools: ToolFactory) -> Exit:
        worker = EnvironmentWorker(
            self._client,
            workdir=self._workdir,
            tools=Guard(self._lease, self._leaving, self._emit).tools(custom_tools),
            max_idle=self._job.max_idle_seconds,
        )
        failures = 0
        while True:
            failure = await self._handle_item(worker)
            if self._lease.lost.is_set():
                return EXIT_LEASE_LOST, "the lease was lost"
            if self._leaving.is_set():
                return await self._hand_over()
            if self._middleware.stopped:
                return EXIT_OK, "stopped by the operator" if self._lease.stopping.is_set() else "the session is idle"
            if failure is not None:
                failures += 1
                self._emit("retry", error=failure, attempt=failures)
                if failures >= SETUP_ATTEMPTS:
                    return await self._give_up(failure)
                await _first(self._leaving.wait(), asyncio.sleep(SETUP_PAUSE_SECONDS * failures))
            # Else new input arrived between the idle decision and the stop: serve it under the same lease.
            self._lock.say("claimed", self._lease.last_heartbeat)

    async def _handle_item(self, worker: EnvironmentWorker) -> str | None:
        """One pass of the SDK's worker. Returns the type of what ended it, if something did."""
        job = self._job
        run = asyncio.create_task(
            worker.handle_item(
                work_id=job.work_id,
                environment_id=job.environment_id,
                session_id=job.session_id,
                work_secret=job.secret,
                environment_key=job.environment_key,
            )
        )
        await _first(run, self._leaving.wait())
        if not run.done():
            run.cancel()
            await asyncio.wait([run], timeout=HANDOVER_SECONDS)
        if not run.done() or run.cancelled() or (error := run.exception()) is None:
            return None
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return type(error).__name__

    async def _may_stop(self) -> bool:
        """Whether a stop of the SDK's worker may reach the control plane (P10)."""
        self._lock.say("leaving", self._lease.last_heartbeat)
        if self._lease.lost.is_set():
            return False
        if self._lease.stopping.is_set():
            return True
        if not (self._leaving.is_set() or self._giving_up):
            try:
                if not await self._turn_is_over():
                    return False
            except anthropic.APIError:
                return False
        return await self._lease_is_ours()

    async def _turn_is_over(self) -> bool:
        """True when the session is gone, or idle at the end of a turn with nothing new in its event log."""
        try:
            session = await self._api.beta.sessions.retrieve(self._job.session_id)
        except anthropic.NotFoundError:
            return True
        if session.status == "terminated":
            return True
        if session.status != "idle":
            return False
        page = await self._api.beta.sessions.events.list(self._job.session_id, order="desc", limit=_RECENT_EVENTS)
        if any(event.type.startswith("user.") and getattr(event, "processed_at", 0) is None for event in page.data):
            return False
        idles = [event for event in page.data if event.type == "session.status_idle"]
        return bool(idles) and idles[0].stop_reason.type != "requires_action"

    async def _lease_is_ours(self) -> bool:
        """The fence before a stop: a heartbeat on the condition of our own last one."""
        try:
            await beat(self._client.with_options(max_retries=0), self._job, NO_HEARTBEAT)
        except anthropic.APIStatusError as error:
            if error.status_code < 500:
                self._lease.lost.set()
            return False
        except anthropic.APIError:
            return False
        return True

    # --- R6: leave -------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """SIGTERM: no new call, end the one in flight, keep its answer for after the stop."""
        self._middleware.hold_results = True
        self._leaving.set()

    async def _hand_over(self) -> Exit:
        """The item is stopped first and the held answers follow: an answer to a session without a live item queues it
        again, for the next sandbox. Sent the other way round it would be spent on the item we are giving up."""
        self._emit("handover", answers=len(self._middleware.held), stopped=self._middleware.stopped)
        await self._send(self._middleware.held)
        return EXIT_HANDED_OVER, "told to leave"

    async def _give_up(self, failure: str) -> Exit:
        """The session cannot be set up here. Its agent is told why instead of waiting for ever."""
        self._giving_up = True
        self._lock.say("leaving", self._lease.last_heartbeat)
        try:
            pending = await pending_calls(self._api, self._job.session_id)
        except anthropic.APIError:
            pending = []
        if await self._lease_is_ours():
            await self._client.beta.environments.work.stop(
                self._job.work_id, environment_id=self._job.environment_id, force=True
            )
            text = f"the sandbox could not be set up for this session ({failure}); nothing was run"
            await self._send([error_result(call, text) for call in pending])
        return EXIT_OK, f"set-up failed {SETUP_ATTEMPTS} times ({failure}); the agent was told"

    async def _send(self, events: list[dict[str, Any]]) -> None:
        if not events:
            return
        sender = self._api.with_options(max_retries=3)
        try:
            await sender.beta.sessions.events.send(self._job.session_id, events=events)  # type: ignore[arg-type]
        except anthropic.APIError as error:
            self._emit("retry", error=type(error).__name__, attempt=0)  # the sweep's healing answers in our place


async def pending_calls(api: AsyncAnthropic, session_id: str) -> list[str]:
    """Ids of the calls of the agent toolset that wait for a result and needed no person's word."""
    calls: dict[str, None] = {}
    async for event in api.beta.sessions.events.list(session_id, limit=1000):
        if event.type == "agent.tool_use" and event.evaluated_permission == "allow":
            calls[event.id] = None
        elif event.type == "user.tool_result":
            calls.pop(event.tool_use_id, None)
    return list(calls)


def error_result(tool_use_id: str, text: str) -> dict[str, Any]:
    """The event that answers a call which did not run to its end."""
    content = [{"type": "text", "text": text}]
    return {"type": "user.tool_result", "tool_use_id": tool_use_id, "is_error": True, "content": content}


async def _first(*waits: Any) -> None:
    """Returns when one of `waits` is done. A task among them goes on; a coroutine among them does not."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()


async def _reap_for_ever() -> None:
    reaper = runner_process.OrphanReaper()
    while True:
        reaper.reap()
        await asyncio.sleep(_REAP_SECONDS)
