"""Healing ends strands: sessions that wait for a tool result no runner will post (R9).

It looks at state, not at causes: whatever killed the runner, what is left is a session idle in `requires_action` and a
work item that no runner holds. The environment key can read both. What was already done about a strand is read from
the session's own event log, never remembered here, so any host at any time comes to the same decision.

- An item `starting` without a heartbeat (acked, never claimed): healing claims it, which only succeeds if no runner has
  or ever will, and stops it. Some servers never let such an item lapse.
- An item stopped for a while: the calls of the agent toolset that wait are answered with an error that says what was
  lost. The answer queues the session again, and a new runner serves what follows.
- If the session was answered so before, in the same turn, and waits again without a runner, answers do not queue it on
  this server: one `user.interrupt` goes with them, which ends the turn and does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import anthropic
from anthropic import AsyncAnthropic, omit

from . import log
from .settings import Settings

STARTING_SECONDS = 150.0  # an acked item is claimed within milliseconds; this is longer than any launch may take
STOPPED_SECONDS = 60.0  # a runner that hands over posts its answers right after its stop
LOST = "The sandbox was lost while this call was running. It may have taken effect; nothing more is known about it."
OWNED_TOOLS = frozenset({"bash", "read", "write", "edit", "glob", "grep"})  # the SDK's agent toolset
SESSIONS_PER_SWEEP = 50  # looked at closely; the next sweep goes on behind them
_PAGE = 100
_MAX_ITEMS = 2000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Strand:
    """What a session waits for, as far as it is ours to answer."""

    call_ids: tuple[str, ...]
    treated: bool
    """An answer of ours is in the log since the turn began."""
    others_wait: bool
    """Something that is not ours waits too: a person's word, another client's tool."""


class Healer:
    """Finds strands and ends them. One per host process; it remembers nothing but where it stopped looking."""

    def __init__(self, client: AsyncAnthropic, settings: Settings) -> None:
        self._client = client
        self._environment_id = settings.environment_id
        self._now: datetime | None = None
        self._cursor = 0

    async def list_work(self) -> list[Any]:
        """The environment's work items. Also notes the server's time, by which their timestamps are judged.

        Empty when the API does not answer: the next sweep asks again.
        """
        items: list[Any] = []
        page: str | None = None
        try:
            while len(items) < _MAX_ITEMS:
                raw = await self._client.beta.environments.work.with_raw_response.list(
                    self._environment_id, limit=_PAGE, page=page or omit
                )
                self._now = parsedate_to_datetime(raw.headers["date"])
                parsed = await raw.parse()
                items += parsed.data
                page = parsed.next_page
                if not page:
                    break
        except anthropic.APIError as error:
            _log.warning(log.line("heal", error=error, reason="the work items cannot be listed"))
            return []
        return items

    async def heal(self, items: Sequence[Any]) -> int:
        """Ends the strands among `items`, a bounded number a sweep. Returns how many sessions it treated."""
        candidates = [item for item in items if item.data.type == "session" and self._nobody_serves(item)]
        start = self._cursor if self._cursor < len(candidates) else 0
        self._cursor = start + SESSIONS_PER_SWEEP
        healed = 0
        for item in candidates[start : self._cursor]:
            try:
                healed += await self._heal(item)
            except anthropic.APIError as error:
                _log.warning(log.line("heal", session=item.data.id, work=item.id, error=error))
        return healed

    def _nobody_serves(self, item: Any) -> bool:
        if item.state == "stopped":
            return self._age(item.stopped_at) > STOPPED_SECONDS
        return item.state == "starting" and not item.latest_heartbeat_at and self._unclaimed(item)

    def _unclaimed(self, item: Any) -> bool:
        return self._age(item.acknowledged_at) > STARTING_SECONDS

    def _age(self, timestamp: str | None) -> float:
        """Seconds since `timestamp` by the server's clock; 0 for what never happened."""
        if not timestamp or self._now is None:
            return 0.0
        return (self._now - datetime.fromisoformat(timestamp)).total_seconds()

    async def _heal(self, item: Any) -> bool:
        if item.state == "starting":
            return await self._free_unclaimed(item)
        session = await self._client.beta.sessions.retrieve(item.data.id)
        if session.status != "idle":
            return False
        strand = await self._strand(item.data.id)
        if not strand.call_ids:
            return False
        events = [_error_result(call_id) for call_id in strand.call_ids]
        interrupts = strand.treated and not strand.others_wait
        if interrupts:
            events.append({"type": "user.interrupt"})
        await self._client.beta.sessions.events.send(item.data.id, events=events)  # type: ignore[arg-type]
        reason = f"{len(strand.call_ids)} calls answered" + (", turn interrupted" if interrupts else "")
        _log.warning(log.line("healed", session=item.data.id, work=item.id, reason=reason))
        return True

    async def _free_unclaimed(self, item: Any) -> bool:
        """Claims an item that was acked and never claimed, and stops it. The claim is the fence: a runner that has it,
        or gets there first, makes ours fail; one that comes later fails itself, before it runs anything."""
        work = self._client.with_options(max_retries=0).beta.environments.work
        try:
            beat = await work.heartbeat(
                item.id, environment_id=item.environment_id, expected_last_heartbeat="NO_HEARTBEAT"
            )
        except anthropic.APIStatusError as error:
            if error.status_code == 412:
                return False
            raise
        if not beat.lease_extended:
            return False
        await work.stop(item.id, environment_id=item.environment_id, force=True)
        reason = "acked and never claimed: stopped, to be queued again"
        _log.warning(log.line("healed", session=item.data.id, work=item.id, reason=reason))
        return True

    async def _strand(self, session_id: str) -> Strand:
        """Reads the event log."""
        waiting: dict[str, Any] = {}
        verdicts: dict[str, str] = {}
        ended_threads: set[str] = set()
        treated = False
        async for event in self._client.beta.sessions.events.list(session_id, limit=1000):
            if event.type in ("agent.tool_use", "agent.custom_tool_use"):
                waiting[event.id] = event
            elif event.type == "user.tool_result":
                waiting.pop(event.tool_use_id, None)
                treated = treated or _is_ours(event)
            elif event.type == "user.custom_tool_result":
                waiting.pop(event.custom_tool_use_id, None)
            elif event.type == "user.tool_confirmation":
                verdicts[event.tool_use_id] = event.result
            elif event.type == "session.thread_status_terminated":
                ended_threads.add(event.session_thread_id)
            elif event.type == "session.status_idle" and event.stop_reason.type != "requires_action":
                waiting, treated = {}, False  # the turn ended; what was open then is not waited for
        alive = [event for event in waiting.values() if event.session_thread_id not in ended_threads]
        ours = [event.id for event in alive if _is_ours_to_answer(event, verdicts)]
        denied = [event for event in alive if _permission(event, verdicts) == "deny"]
        return Strand(tuple(ours), treated, others_wait=len(ours) + len(denied) < len(alive))


def _permission(event: Any, verdicts: dict[str, str]) -> str:
    """allow, ask or deny; anything newer than that counts as ask."""
    evaluated = getattr(event, "evaluated_permission", None)
    if evaluated == "deny":
        return "deny"
    return verdicts.get(event.id, "allow" if evaluated == "allow" else "ask")


def _is_ours_to_answer(event: Any, verdicts: dict[str, str]) -> bool:
    return event.type == "agent.tool_use" and event.name in OWNED_TOOLS and _permission(event, verdicts) == "allow"


def _is_ours(result: Any) -> bool:
    return any(getattr(block, "text", None) == LOST for block in result.content or [])


def _error_result(tool_use_id: str) -> dict[str, Any]:
    content = [{"type": "text", "text": LOST}]
    return {"type": "user.tool_result", "tool_use_id": tool_use_id, "is_error": True, "content": content}
