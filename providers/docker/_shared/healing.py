"""Healing ends strands: sessions that wait for a tool result no runner will post (R9).

It looks at state, not at causes: whatever killed the runner, what is left is a session idle in `requires_action` and a
work item that no runner holds. The environment key can read both. What was already done about a strand is read from
the session's own event log, never remembered here, so any host at any time comes to the same decision.

- An item `starting` without a heartbeat (acked, never claimed): healing claims it, which only succeeds if no runner has
  or ever will, and stops it. Some servers never let such an item lapse.
- An item stopped for a while: the calls of the agent toolset that wait are answered with an error that says what was
  lost. The answer queues the session again, and a new runner serves what follows.
- If we answered since the item stopped and the session waits again, answers do not queue it on this server: one
  `user.interrupt` goes with them, which ends the turn and does.

A finished session costs one small request, and only so many are looked at in a sweep: the latest to stop, where a
strand shows first, and some of the others at random, so that no host has to remember where the last one ended.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import anthropic
from anthropic import AsyncAnthropic, omit
from anthropic.types.beta.environments import BetaSelfHostedWork
from anthropic.types.beta.sessions import BetaManagedAgentsSessionEventType

from . import log
from .settings import Settings

STARTING_SECONDS = 150.0  # an acked item is claimed within milliseconds; this is longer than any launch may take
STOPPED_SECONDS = 60.0  # a runner that hands over posts its answers right after its stop
LOST = "The sandbox was lost while this call was running. It may have taken effect; nothing more is known about it."
OWNED_TOOLS = frozenset({"bash", "read", "write", "edit", "glob", "grep"})  # the SDK's agent toolset
LATEST_PER_SWEEP = 30  # stopped items looked at: those that stopped last,
OTHERS_PER_SWEEP = 20  # and some of the rest
_STATUS_EVENTS: list[BetaManagedAgentsSessionEventType] = [
    "session.status_running",
    "session.status_idle",
    "session.status_rescheduled",
    "session.status_terminated",
]
_PAGE = 100
_MAX_ITEMS = 10_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Strand:
    """What a session waits for, as far as it is ours to answer."""

    call_ids: tuple[str, ...]
    treated: bool
    """An answer of ours is in the log since the item stopped."""
    others_wait: bool
    """Something that is not ours to answer waits too: a person's word, another client's tool, a call just made."""


class Healer:
    """Finds strands and ends them. It remembers nothing from one sweep to the next."""

    def __init__(self, client: AsyncAnthropic, settings: Settings) -> None:
        self._client = client
        self._environment_id = settings.environment_id
        self._now: datetime | None = None

    async def list_work(self) -> list[BetaSelfHostedWork] | None:
        """The environment's work items. Also notes the server's time, by which their timestamps are judged.

        None when the API does not answer: the next sweep asks again.
        """
        items: list[BetaSelfHostedWork] = []
        page: str | None = None
        self._now = None
        try:
            while True:
                raw = await self._client.beta.environments.work.with_raw_response.list(
                    self._environment_id, limit=_PAGE, page=page or omit
                )
                if self._now is None and (date := raw.headers.get("date")):
                    self._now = parsedate_to_datetime(date)
                parsed = await raw.parse()
                items += parsed.data
                page = parsed.next_page
                if not page:
                    return items
                if len(items) >= _MAX_ITEMS:
                    reason = f"more than {_MAX_ITEMS} work items: the rest is not looked at"
                    _log.warning(log.line("heal", reason=reason))
                    return items
        except anthropic.APIError as error:
            _log.warning(log.line("heal", error=error, reason="the work items cannot be listed"))
            return None

    async def heal(self, items: Sequence[BetaSelfHostedWork]) -> int:
        """Ends the strands among `items`, as `list_work` gave them. Returns how many sessions it treated."""
        healed = 0
        for item in self._candidates([item for item in items if item.data.type == "session"]):
            try:
                healed += await (self._free_unclaimed(item) if item.state == "starting" else self._heal(item))
            except anthropic.NotFoundError:
                continue  # deleted meanwhile
            except anthropic.RateLimitError as error:
                _log.warning(log.line("heal", error=error, reason="the API asks to slow down; the next sweep goes on"))
                break
            except anthropic.APIError as error:
                _log.warning(log.line("heal", session=item.data.id, work=item.id, error=error))
        return healed

    def _candidates(self, items: Sequence[BetaSelfHostedWork]) -> list[BetaSelfHostedWork]:
        unclaimed = [
            item
            for item in items
            if item.state == "starting"
            and not item.latest_heartbeat_at
            and self._age(item.acknowledged_at) > STARTING_SECONDS
        ]
        stopped = [item for item in items if item.state == "stopped" and self._age(item.stopped_at) > STOPPED_SECONDS]
        stopped.sort(key=lambda item: self._age(item.stopped_at))
        others = stopped[LATEST_PER_SWEEP:]
        others = random.sample(others, min(OTHERS_PER_SWEEP, len(others)))
        return [*unclaimed[:LATEST_PER_SWEEP], *stopped[:LATEST_PER_SWEEP], *others]

    def _age(self, moment: datetime | str | None) -> float:
        """Seconds since `moment` by the server's clock; 0 for what never happened."""
        if not moment or self._now is None:
            return 0.0
        if isinstance(moment, str):
            moment = datetime.fromisoformat(moment)
        return (self._now - moment).total_seconds()

    async def _heal(self, item: BetaSelfHostedWork) -> bool:
        session_id = item.data.id
        awaited = await self._awaited(session_id)
        if not awaited or (await self._client.beta.sessions.retrieve(session_id)).status != "idle":
            return False
        strand = await self._strand(session_id, awaited, self._age(item.stopped_at))
        if not strand.call_ids:
            return False
        events = [_error_result(call_id) for call_id in strand.call_ids]
        interrupts = strand.treated and not strand.others_wait
        if interrupts:
            events.append({"type": "user.interrupt"})
        await self._client.beta.sessions.events.send(session_id, events=events)  # type: ignore[arg-type]
        reason = f"{len(strand.call_ids)} calls answered" + (", turn interrupted" if interrupts else "")
        _log.warning(log.line("healed", session=session_id, work=item.id, reason=reason))
        return True

    async def _free_unclaimed(self, item: BetaSelfHostedWork) -> bool:
        """Claims an item that was acked and never claimed, and stops it. The claim is the fence: a runner that has it,
        or gets there first, makes ours fail; one that comes later fails itself, before it runs anything."""
        work = self._client.with_options(max_retries=0).beta.environments.work
        try:
            beat = await work.heartbeat(
                item.id, environment_id=self._environment_id, expected_last_heartbeat="NO_HEARTBEAT"
            )
        except anthropic.APIStatusError as error:
            if error.status_code == 412:
                return False
            raise
        if not beat.lease_extended:
            return False
        await work.stop(item.id, environment_id=self._environment_id, force=True)
        reason = "acked and never claimed: stopped, so that it can be queued again"
        _log.warning(log.line("healed", session=item.data.id, work=item.id, reason=reason))
        return True

    async def _awaited(self, session_id: str) -> frozenset[str]:
        """What the session waits for by its own last word, calls and all; empty when it does not wait."""
        last = await self._client.beta.sessions.events.list(session_id, types=_STATUS_EVENTS, order="desc", limit=1)
        stop_reason = getattr(last.data[0], "stop_reason", None) if last.data else None
        return frozenset(getattr(stop_reason, "event_ids", None) or ())

    async def _strand(self, session_id: str, awaited: frozenset[str], stopped_for: float) -> Strand:
        """Reads the event log."""
        calls: dict[str, Any] = {}
        answered: set[str] = set()
        verdicts: dict[str, str] = {}
        ended_threads: set[str] = set()
        treated = False
        event: Any
        async for event in self._client.beta.sessions.events.list(session_id, limit=1000):
            if event.id in awaited:
                calls[event.id] = event
            elif event.type == "user.tool_result":
                answered.add(event.tool_use_id)
                treated |= _is_ours(event) and self._age(event.processed_at) < stopped_for
            elif event.type == "user.custom_tool_result":
                answered.add(event.custom_tool_use_id)
            elif event.type == "user.tool_confirmation":
                verdicts[event.tool_use_id] = event.result
            elif event.type == "session.thread_status_terminated":
                ended_threads.add(event.session_thread_id)
        open_calls = awaited - answered
        # A call made since the items were listed may have a runner that was launched since.
        ours = [
            call.id
            for call in calls.values()
            if call.id in open_calls
            and call.session_thread_id not in ended_threads
            and _is_ours_to_answer(call, verdicts)
            and self._age(call.processed_at) > STOPPED_SECONDS
        ]
        return Strand(tuple(ours), treated, others_wait=len(ours) < len(open_calls))


def _is_ours_to_answer(event: Any, verdicts: dict[str, str]) -> bool:
    """A call of the agent toolset that was allowed, by a rule or by a person."""
    if event.type != "agent.tool_use" or event.name not in OWNED_TOOLS:
        return False
    permission = event.evaluated_permission
    return permission == "allow" or (permission == "ask" and verdicts.get(event.id) == "allow")


def _is_ours(result: Any) -> bool:
    return any(getattr(block, "text", None) == LOST for block in result.content or [])


def _error_result(tool_use_id: str) -> dict[str, Any]:
    content = [{"type": "text", "text": LOST}]
    return {"type": "user.tool_result", "tool_use_id": tool_use_id, "is_error": True, "content": content}
