"""One session under one lease: claim, serve, leave (R1, R4, R6).

The SDK's `EnvironmentWorker.handle_item` does the serving. Around it stand the claim and the answers to what others
left open before it starts, the question whether its stop may go through, the look back after it, and what happens on
SIGTERM. One file, since each of these leans on what the one before has found out about the lease.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anthropic
from anthropic.lib.environments import EnvironmentWorker

from .runner_answers import Answers
from .runner_claim import CALL_TIMEOUT_SECONDS, SETTLE_SECONDS, NotOurs, ack_and_claim, beat, open_api, probe
from .runner_events import EventLog, read_log, turn_is_over
from .runner_job import EXIT_HANDED_OVER, EXIT_LEASE_LOST, EXIT_OK, RunnerJob
from .runner_journal import DIRECTORY, Journal
from .runner_lease import NO_HEARTBEAT, Lease, LeaseMiddleware, first_of
from .runner_lock import Lock, Phase
from .runner_patience import Patience
from .runner_tools import Guard, Mark, ToolFactory

TEARDOWN_SECONDS = 12.0  # for the SDK after SIGTERM: the tool's end, the memory flush, the stop
FLUSH_SECONDS = 60.0  # before that, where nothing hurries: the SDK's own limit for a flush is half of it
LOOK_BACK_SECONDS = 5.0  # after our stop at the end of a turn, while a last message is still thought about
LEAVE_SECONDS = 10.0  # then, for our own stop and the held answers
MAX_RETRIES = 2  # of one request; the SDK's own default
SETUP_ATTEMPTS = 3
SETUP_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 30.0
_ABORT_SECONDS = 1.0
SETTLE_CALLS_SECONDS = 30.0  # for the answers at the start; far below the lease, which nothing extends meanwhile

Emit = Callable[..., None]
Exit = tuple[int, str]


class Session:
    """Serves one job. `leaving` is set by `leave`; `kill` ends every process that the tools left behind, and
    what `mark` returns those that were started since."""

    def __init__(
        self,
        job: RunnerJob,
        *,
        lock: Lock,
        leaving: asyncio.Event,
        workdir: Path,
        emit: Emit,
        kill: Callable[[], object],
        mark: Mark = lambda: lambda: None,
        max_retries: int = MAX_RETRIES,
        settle_seconds: float = SETTLE_SECONDS,
        pause_seconds: float = SETUP_PAUSE_SECONDS,
        teardown_seconds: float = TEARDOWN_SECONDS,
        flush_seconds: float = FLUSH_SECONDS,
        leave_seconds: float = LEAVE_SECONDS,
        look_back_seconds: float = LOOK_BACK_SECONDS,
        settle_calls_seconds: float = SETTLE_CALLS_SECONDS,
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
        self._flush_seconds = flush_seconds
        self._leave_seconds = leave_seconds
        self._look_back_seconds = look_back_seconds
        self._settle_calls_seconds = settle_calls_seconds
        self._phase: Phase = "claimed"
        self._giving_up = False
        self._api = open_api(job)
        self._lease = Lease(on_beat=lambda beat: lock.say(self._phase, beat))
        self._log = EventLog()
        self._journal = Journal(workdir / DIRECTORY)
        self._guard = Guard(
            self._lease, leaving, emit, kill, log=self._log, journal=self._journal, mark=mark, named=job.tool_names
        )
        self._patience = Patience(self._log, self._guard, job.max_wait_seconds, first=job.max_idle_seconds)
        self._middleware = LeaseMiddleware(self._lease, self._may_stop, self._log)
        self._client = open_api(job, self._middleware, max_retries=max_retries, timeout=60.0)
        self._answers = Answers(self._api.with_options(max_retries=max_retries), job, emit)

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
            watches = [asyncio.create_task(watch()) for watch in (self._lease.watch, self._patience.watch)]
            try:
                return await self._serve(custom_tools)
            finally:
                for watch in watches:
                    watch.cancel()
                self._kill()

    # --- R4: serve until a stop may go through ---------------------------------------------------------------------

    async def _serve(self, custom_tools: ToolFactory) -> Exit:
        guard = self._guard
        settling = self._answers.settle_predecessors(self._log, self._journal)
        await self._unless(self._ends, settling, self._settle_calls_seconds)
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
            if self._patience.is_over.is_set():
                self._patience.begin_again()
                continue
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

    async def _unless(self, ends: tuple[asyncio.Event, ...], work: Coroutine[Any, Any, None], seconds: float) -> None:
        """Does `work` for so long, or until one of `ends` is set."""
        doing = asyncio.create_task(work)
        await first_of(doing, *(event.wait() for event in ends), asyncio.sleep(seconds))
        if doing.done():
            doing.result()
        doing.cancel()
        await asyncio.wait([doing], timeout=_ABORT_SECONDS)

    @property
    def _ends(self) -> tuple[asyncio.Event, ...]:
        return (self._leaving, self._lease.lost, self._lease.stopping)

    @property
    def _is_over(self) -> bool:
        return self._middleware.stopped or any(event.is_set() for event in self._ends)

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
        hurries = (self._leaving, self._lease.lost)
        await first_of(run, *(event.wait() for event in hurries), self._patience.is_over.wait())
        if not run.done():
            run.cancel()  # lets the SDK end the tool, flush and stop, in its own time if only patience has ended
            await first_of(run, *(event.wait() for event in hurries), asyncio.sleep(self._flush_seconds))
            await asyncio.wait([run], timeout=self._teardown_seconds)
            if not run.done():
                run.cancel()  # ends what still hangs
                await asyncio.wait([run], timeout=_ABORT_SECONDS)
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
        if not self._lease.stopping.is_set():
            if not (self._leaving.is_set() or self._giving_up):
                try:
                    if not await self._has_nothing_to_do():
                        return False
                except anthropic.APIError:
                    return False
            if not await self._lease_is_ours():
                return False
        return not self._lease.stopping.is_set() or await self._is_to_be_stopped()

    async def _has_nothing_to_do(self) -> bool:
        if await turn_is_over(self._api, self._job.session_id, self._log.interrupted):
            return True
        if not self._patience.is_over.is_set():
            return False
        return self._patience.is_justified(await read_log(self._api, self._job.session_id))

    async def _lease_is_ours(self) -> bool:
        """The fence before a stop: a heartbeat on the condition of our own last one, which the middleware puts in."""
        try:
            await beat(self._client.with_options(max_retries=1, timeout=CALL_TIMEOUT_SECONDS), self._job, NO_HEARTBEAT)
        except anthropic.APIError:
            return False
        return not self._lease.lost.is_set()

    async def _is_to_be_stopped(self) -> bool:
        """The fence once the server has spoken of a stop: it compares nothing then. If somebody else has completed it
        and the session was queued again since, that item is not ours to stop."""
        lease = await probe(self._api.with_options(max_retries=1), self._job)
        if lease is None:
            return False
        self._middleware.stopped |= lease.state == "stopped"
        if lease.state not in ("starting", "active"):
            return lease.state == "stopping"
        if lease.last_heartbeat != self._lease.last_heartbeat:
            self._lease.lost.set()
            return False
        return True

    def _say(self, phase: Phase) -> None:
        self._phase = phase
        self._lock.say(phase, self._lease.last_heartbeat)

    # --- R6, P9: leave ---------------------------------------------------------------------------------------------

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
                    await self._answers.send(held)
        except TimeoutError:
            self._emit("retry", error="TimeoutError", attempt=0)  # what was not sent is the sweep's to heal
        if self._lease.lost.is_set():
            return EXIT_LEASE_LOST, "the lease was lost"
        if told:
            return EXIT_HANDED_OVER, "told to leave"
        if self._lease.stopping.is_set() and not self._lease.stop_sent:
            return EXIT_OK, "stopped by the operator"
        looking = self._answers.look_back(self._guard.owned, self._log.interrupted)
        await self._unless((self._leaving, self._lease.lost), looking, self._look_back_seconds)
        waited = self._patience.is_over.is_set()
        return EXIT_OK, "nobody else went on" if waited else "the session is idle"

    async def _give_up(self, failure: str) -> bool:
        """The session cannot be set up here. Its agent is told why instead of waiting for ever. Stop first, as in
        `_leave`: what the agent does next gets another sandbox. False when the control plane could not be told."""
        try:
            log = await read_log(self._api.with_options(max_retries=self._max_retries), self._job.session_id)
        except anthropic.APIError:
            return False
        self._giving_up = True  # for this one stop only, not for one of the SDK's in a later pass
        stopped = await self._stop()
        self._giving_up = False
        if not stopped:
            return False
        text = f"the sandbox could not be set up for this session ({failure}); nothing was run"
        pending = [call for call in log.open.values() if call.is_ours(self._job.tool_names)]
        await self._answers.send([call.error(text) for call in pending])
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
