"""Answers the runner gives in a tool's place, so that nobody waits for a result that will not come (R5, P1, P3).

At the start: to calls that a dead predecessor had begun, and to those whose turn was interrupted. After our stop: to
calls that came in its last instant, which the server does not queue again by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import anthropic
from anthropic import AsyncAnthropic

from .runner_claim import probe
from .runner_events import EventLog, read_log, recent_log
from .runner_job import RunnerJob
from .runner_journal import Journal

LOST = "the sandbox was lost while this ran; it may have taken effect"
INTERRUPTED_BEFORE = "the turn was interrupted before this had an answer; it was not run again"
NEVER_STARTED = "the sandbox was shut down before this was started; nothing of it was run"
_LOOK_AGAIN_SECONDS = 1.0


class Answers:
    """`api` retries by itself."""

    def __init__(self, api: AsyncAnthropic, job: RunnerJob, emit: Callable[..., None]) -> None:
        self._api = api
        self._job = job
        self._emit = emit

    async def settle_predecessors(self, log: EventLog, journal: Journal) -> None:
        """Reads the log and answers what was open before us and is not to be run. What cannot be answered now is still
        not run: the guard knows the journal, and the SDK's worker is not shown what was interrupted."""
        try:
            await read_log(self._api, self._job.session_id, log)
        except anthropic.APIError as error:
            self._emit("retry", error=type(error).__name__, attempt=0)
            return
        lost = [call.error(LOST) for call in log.open.values() if call.id in journal]
        ended = [call for call in log.interrupted.values() if call.id not in log.answered]
        ours = [call for call in ended if call.id in journal or call.is_ours(self._job.tool_names)]
        await self.send([*lost, *(call.error(INTERRUPTED_BEFORE) for call in ours)])

    async def look_back(self, owned: Collection[str], settled: Collection[str]) -> None:
        """Once our stop is confirmed: a message that the session took up between our last look and the stop had a live
        item, so it queued none. What it led to is answered, which does; while the model still works, we look again.
        Ends when there is nothing to do, and for the caller's time limit."""
        try:
            while not (await recent_log(self._api, self._job.session_id, settled)).is_over:
                log = await read_log(self._api, self._job.session_id)
                if log.only_waits(owned):
                    return
                lease = await probe(self._api, self._job)
                if lease is None or lease.state != "stopped":
                    return  # queued again already, perhaps served: it is another runner's
                if waiting := [call for call in log.open.values() if call.name in owned]:
                    await self.send([call.error(NEVER_STARTED) for call in waiting])
                    return
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        except anthropic.APIError as error:
            self._emit("retry", error=type(error).__name__, attempt=0)  # the sweep looks in our place

    async def send(self, events: list[dict[str, Any]]) -> None:
        """One by one: a request with several is refused as a whole, and one of them may be answered already."""
        for event in events:
            try:
                await self._api.beta.sessions.events.send(self._job.session_id, events=[event])  # type: ignore[list-item]
            except anthropic.BadRequestError:
                continue  # nobody waits for it any more
            except anthropic.APIError as error:
                self._emit("retry", error=type(error).__name__, attempt=0)  # the sweep's healing answers in our place
