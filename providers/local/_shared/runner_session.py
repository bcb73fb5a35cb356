"""One session under one lease: claim, serve, leave (R1, R4, R6).

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

from .runner_claim import CALL_TIMEOUT_SECONDS, SETTLE_SECONDS, NotOurs, ack_and_claim, beat, open_api
from .runner_job import EXIT_HANDED_OVER, EXIT_LEASE_LOST, EXIT_OK, RunnerJob
from .runner_lease import NO_HEARTBEAT, Lease, LeaseMiddleware, first_of
from .runner_lock import Lock, Phase
from .runner_tools import Guard, ToolFactory

TEARDOWN_SECONDS = 12.0  # for the SDK after SIGTERM: the tool's end, the memory flush, the stop
LEAVE_SECONDS = 10.0  # then, for our own stop and the held answers
MAX_RETRIES = 2  # of one request; the SDK's own default
SETUP_ATTEMPTS = 3
SETUP_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 30.0
_ABORT_SECONDS = 1.0
_RECENT_EVENTS = 100

Emit = Callable[..., None]
Exit = tuple[int, str]


class Session:
    """Serves one job. `leaving` is set by `leave`; `kill` ends every process that the tools left behind."""

    def __init__(
        self,
        job: RunnerJob,
        *,
        lock: Lock,
        leaving: asyncio.Event,
        workdir: Path,
        emit: Emit,
        kill: Callable[[], object],
        max_retries: int = MAX_RETRIES,
        settle_seconds: float = SETTLE_SECONDS,
        pause_seconds: float = SETUP_PAUSE_SECONDS,
        teardown_seconds: float = TEARDOWN_SECONDS,
        leave_seconds: float = LEAVE_SECONDS,
    ) -> None:
        self._job = job
        self._lock = lock
        self._leaving = leaving
        self._workdir = workdir
        self._emit = emit
        self._kill = kill
        self._max_retries = max_retries
        self._settle_seconds = settle_seconds
        self._pause_seconds = pause_seconds
        self._teardown_seconds = teardown_seconds
        self._leave_seconds = leave_seconds
        self._phase: Phase = "claimed"
        self._giving_up = False
        self._api = open_api(job)
        self._lease = Lease(on_beat=lambda beat: lock.say(self._phase, beat))
        self._middleware = LeaseMiddleware(self._lease, self._may_stop)
        self._client = open_api(job, middleware=[self._middleware], max_retries=max_retries, timeout=60.0)

    async def run(self, custom_tools: ToolFactory) -> Exit:
        """From the ack to the exit code."""
        async with self._api, self._client:
            if self._leaving.is_set():
                return EXIT_HANDED_OVER, "told to leave before the ack"
            began = time.monotonic()
            claiming = asyncio.create_task(
                ack_and_claim(self._api, self._job, self._lease, settle_seconds=self._settle_seconds)
            )
            await first_of(claiming, self._leaving.wait())
            await asyncio.wait([claiming], timeout=CALL_TIMEOUT_SECONDS)  # no longer than one answer takes, if leaving
            if not claiming.done():
                claiming.cancel()
                return EXIT_HANDED_OVER, "told to leave before the claim was settled"
            try:
                claiming.result()
            except NotOurs as refused:
                return EXIT_LEASE_LOST, str(refused)
            self._emit("claimed", session=self._job.session_id, ms=round((time.monotonic() - began) * 1000))
            watch = asyncio.create_task(self._lease.watch())
            try:
                return await self._serve(custom_tools)
            finally:
                watch.cancel()
                self._kill()

    # --- R4: serve until a stop may go through ---------------------------------------------------------------------

    async def _serve(self, custom_tools: ToolFactory) -> Exit:
        guard = Guard(self._lease, self._leaving, self._emit, self._kill)
        worker = EnvironmentWorker(
            self._client, workdir=self._workdir, tools=guard.tools(custom_tools), max_idle=self._job.max_idle_seconds
        )
        failures = 0
        while not self._is_over:
            self._say("claimed")
            guard.is_set_up = False
            began = time.monotonic()
            failure = await self._handle_item(worker)
            if self._is_over:
                break
            # The SDK returns for idleness no sooner than this; sooner, it had trouble, and need not have raised.
            if guard.is_set_up and time.monotonic() - began >= max(self._job.max_idle_seconds, self._pause_seconds):
                failures = 0
                if failure is None:
                    continue  # new input came between the idle decision and the stop: served under the same lease
            failures += 1
            failure = failure or "EndedEarly"
            self._emit("retry", error=failure, attempt=failures)
            if failures >= SETUP_ATTEMPTS and await self._give_up(failure):
                return EXIT_OK, f"set-up failed {failures} times ({failure}); the agent was told"
            pause = min(self._pause_seconds * failures, _LONGEST_PAUSE_SECONDS)
            await first_of(self._leaving.wait(), self._lease.lost.wait(), asyncio.sleep(pause))
        return await self._leave()

    @property
    def _is_over(self) -> bool:
        ends = (self._leaving, self._lease.lost, self._lease.stopping)
        return self._middleware.stopped or any(event.is_set() for event in ends)

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
        await first_of(run, self._leaving.wait(), self._lease.lost.wait())
        if not run.done():
            # The first cancellation lets the SDK end the tool, flush and stop; the second ends what still hangs then.
            for seconds in (self._teardown_seconds, _ABORT_SECONDS):
                run.cancel()
                await asyncio.wait([run], timeout=seconds)
                if run.done():
                    break
        if not run.done() or run.cancelled() or (error := run.exception()) is None:
            return None
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return type(error).__name__

    async def _may_stop(self) -> bool:
        """Whether a stop of the SDK's worker may reach the control plane (P10)."""
        self._say("leaving")
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
        for event in page.data:
            if event.type == "session.status_idle":
                return event.stop_reason.type != "requires_action"
            if event.type.startswith("user.") and event.type != "user.tool_confirmation":
                return False  # processed or not: newer than the idle
        return False

    async def _lease_is_ours(self) -> bool:
        """The fence before a stop: a heartbeat on the condition of our own last one, which the middleware puts in."""
        try:
            await beat(self._client.with_options(max_retries=1, timeout=CALL_TIMEOUT_SECONDS), self._job, NO_HEARTBEAT)
        except anthropic.APIError:
            return False
        return True

    def _say(self, phase: Phase) -> None:
        self._phase = phase
        self._lock.say(phase, self._lease.last_heartbeat)

    # --- R6: leave -------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """SIGTERM: no new call, end the one in flight, keep its answer for after the stop."""
        self._middleware.hold_results = True
        self._leaving.set()

    async def _leave(self) -> Exit:
        """The item is stopped first and the held answers follow: an answer to a session without a live item queues it
        again, for the next sandbox. Sent the other way round it would be spent on the item we are giving up."""
        told, held = self._leaving.is_set(), self._middleware.held
        try:
            async with asyncio.timeout(self._leave_seconds):
                if not self._middleware.stopped:
                    await self._stop()
                if told:
                    self._emit("handover", answers=len(held), stopped=self._middleware.stopped)
                if not self._lease.lost.is_set():
                    await self._send(held)
        except TimeoutError:
            self._emit("retry", error="TimeoutError", attempt=0)  # what was not sent is the sweep's to heal
        if self._lease.lost.is_set():
            return EXIT_LEASE_LOST, "the lease was lost"
        if told:
            return EXIT_HANDED_OVER, "told to leave"
        return EXIT_OK, "stopped by the operator" if self._lease.stopping.is_set() else "the session is idle"

    async def _give_up(self, failure: str) -> bool:
        """The session cannot be set up here. Its agent is told why instead of waiting for ever. Stop first, as in
        `_leave`: what the agent does next gets another sandbox. False when the control plane could not be told."""
        try:
            pending = await pending_calls(self._api.with_options(max_retries=self._max_retries), self._job.session_id)
        except anthropic.APIError:
            return False
        self._giving_up = True  # for this one stop only, not for one of the SDK's in a later pass
        stopped = await self._stop()
        self._giving_up = False
        if not stopped:
            return False
        text = f"the sandbox could not be set up for this session ({failure}); nothing was run"
        await self._send([error_result(call, text) for call in pending])
        return True

    async def _stop(self) -> bool:
        """Our own stop, fenced like the SDK's. True when the item is stopped."""
        if not self._lease.lost.is_set():
            work = self._client.with_options(max_retries=1, timeout=CALL_TIMEOUT_SECONDS).beta.environments.work
            try:
                await work.stop(self._job.work_id, environment_id=self._job.environment_id, force=True)
            except anthropic.APIError:
                return self._middleware.stopped  # a 409 raises, and says that it is stopped
        return self._middleware.stopped

    async def _send(self, events: list[dict[str, Any]]) -> None:
        """One by one: a request with several is refused as a whole, and one of them may be answered already."""
        events_api = self._api.with_options(max_retries=self._max_retries).beta.sessions.events
        for event in events:
            try:
                await events_api.send(self._job.session_id, events=[event])  # type: ignore[list-item]
            except anthropic.APIError as error:
                self._emit("retry", error=type(error).__name__, attempt=0)  # the sweep's healing answers in our place


async def pending_calls(api: AsyncAnthropic, session_id: str) -> list[str]:
    """Ids of the calls of the agent toolset that wait for a result, and for nobody's word."""
    calls: dict[str, None] = {}
    asked: set[str] = set()
    async for event in api.beta.sessions.events.list(session_id, limit=1000):
        if event.type == "agent.tool_use" and event.evaluated_permission == "allow":
            calls[event.id] = None
        elif event.type == "agent.tool_use" and event.evaluated_permission == "ask":
            asked.add(event.id)
        elif event.type == "user.tool_confirmation" and event.result == "allow" and event.tool_use_id in asked:
            calls[event.tool_use_id] = None
        elif event.type == "user.tool_result":
            calls.pop(event.tool_use_id, None)
        elif event.type == "user.interrupt" and event.processed_at is not None:
            calls.clear()  # nothing waits for them any more
    return list(calls)


def error_result(tool_use_id: str, text: str) -> dict[str, Any]:
    """The event that answers a call which did not run to its end."""
    content = [{"type": "text", "text": text}]
    return {"type": "user.tool_result", "tool_use_id": tool_use_id, "is_error": True, "content": content}
