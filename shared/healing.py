"""Healing ends strands: sessions that wait for a tool result no runner will post (R9).

It looks at state, not at causes: whatever killed the runner, what is left is a session idle in `requires_action` and a
work item that no runner holds. The environment key can read both. What was already done about a strand is read from
the session's own event log, never remembered here, so any host at any time comes to the same decision.

- An item that no runner holds and that the server does not let go is stopped (`freeing`), and if a runner has ever had
  it, what waits is answered at once.
- An item stopped for a while: the calls of the agent toolset that wait are answered with an error that says what was
  lost. The answer queues the session again, and a new runner serves what follows.
- If we answered since the item stopped and the session waits again, answers do not queue it on this server: one
  `user.interrupt` goes with them, which ends the turn and does.

A finished session costs one small request, and only so many are looked at in a sweep: those a webhook has named since
the last one, the latest to stop, where a strand shows first, and some of the others at random, so that no host has to
remember where the last one ended.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import anthropic
from anthropic import AsyncAnthropic, omit
from anthropic.types.beta.environments import BetaSelfHostedWork
from anthropic.types.beta.sessions import BetaManagedAgentsSessionEventType

from . import log
from .freeing import Freeing
from .settings import Settings

STOPPED_SECONDS = 60.0  # a runner that hands over posts its answers right after its stop
LOST = "The sandbox was lost while this call was running. It may have taken effect; nothing more is known about it."
OWNED_TOOLS = frozenset({"bash", "read", "write", "edit", "glob", "grep"})  # the SDK's agent toolset
LATEST_PER_SWEEP = 30  # stopped items looked at: those that stopped last,
OTHERS_PER_SWEEP = 20  # and some of the rest
LOOKS_PER_HINT = 3  # sweeps in which a session that a webhook has named comes first: its call is too young at the first
_MOST_HINTS = 1000
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

    calls: tuple[Any, ...]
    treated: bool
    """An answer of ours is in the log since the item stopped."""
    others_wait: bool
    """Something that is not ours to answer waits too: a person's word, another client's tool, a call just made."""


class Healer:
    """Finds strands and ends them. What it remembers are hints where to look first; nothing depends on them."""

    def __init__(self, client: AsyncAnthropic, settings: Settings) -> None:
        self._client = client
        self._environment_id = settings.environment_id
        self._own_tools = frozenset(settings.tool_names)
        self._freeing = Freeing(client, settings.environment_id)
        self._hints: dict[str, int] = {}
        self._now: datetime | None = None

    def hint(self, session_id: str) -> None:
        """Something happened to the session: the next sweeps look at it first, however long ago its item stopped."""
        self._hints.pop(session_id, None)
        self._hints[session_id] = LOOKS_PER_HINT
        while len(self._hints) > _MOST_HINTS:
            del self._hints[next(iter(self._hints))]

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
                if page is None:
                    self._now = _server_time(raw.headers.get("date", ""))
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
                healed += await (self._heal(item) if item.state == "stopped" else self._free(item))
            except anthropic.NotFoundError:
                continue  # deleted meanwhile
            except anthropic.RateLimitError as error:
                _log.warning(log.line("heal", error=error, reason="the API asks to slow down; the next sweep goes on"))
                break
            except anthropic.APIError as error:
                _log.warning(log.line("heal", session=item.data.id, work=item.id, error=error))
        return healed

    def _candidates(self, items: Sequence[BetaSelfHostedWork]) -> list[BetaSelfHostedWork]:
        held = [item for item in items if self._freeing.is_due(item, self._age)]
        stopped = [item for item in items if item.state == "stopped" and self._age(item.stopped_at) > STOPPED_SECONDS]
        stopped.sort(key=lambda item: self._age(item.stopped_at))
        hinted = [item for item in stopped if item.data.id in self._hints]
        self._hints = {session_id: looks - 1 for session_id, looks in self._hints.items() if looks > 1}
        stopped = [item for item in stopped if item not in hinted]
        others = stopped[LATEST_PER_SWEEP:]
        others = random.sample(others, min(OTHERS_PER_SWEEP, len(others)))
        return [*held[:LATEST_PER_SWEEP], *hinted[:LATEST_PER_SWEEP], *stopped[:LATEST_PER_SWEEP], *others]

    def _age(self, moment: datetime | str | None) -> float:
        """Seconds since `moment` by the server's clock; 0 for what never happened."""
        if not moment or self._now is None:
            return 0.0
        if isinstance(moment, str):
            moment = datetime.fromisoformat(moment)
        return (self._now - moment).total_seconds()

    async def _free(self, item: BetaSelfHostedWork) -> bool:
        """A stop may queue the session again. So what waits is answered at once if a runner has had the item: the next
        one, on another disk, could not know what was begun."""
        if not await self._freeing.free(item):
            return False
        if item.latest_heartbeat_at:
            await self._heal(item)
        return True

    async def _heal(self, item: BetaSelfHostedWork) -> bool:
        session_id = item.data.id
        awaited = await self._awaited(session_id)
        if not awaited or (await self._client.beta.sessions.retrieve(session_id)).status != "idle":
            return False
        strand = await self._strand(session_id, awaited, self._age(item.stopped_at))
        if not strand.calls:
            return False
        events = [_error_result(call) for call in strand.calls]
        interrupts = strand.treated and not strand.others_wait
        if interrupts:
            events.append({"type": "user.interrupt"})
        # At once: the first answer queues the session, and its next runner must not find the second call open. A 400
        # for all of them says that one was answered meanwhile; the log says which, at the next sweep.
        await self._client.beta.sessions.events.send(session_id, events=events)  # type: ignore[arg-type]
        reason = f"{len(strand.calls)} calls answered" + (", turn interrupted" if interrupts else "")
        _log.warning(log.line("healed", session=session_id, work=item.id, reason=reason))
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
            # Since the items were listed something happened: a person's word, a message, a runner of theirs. What the
            # list says of the item may be over, and the next sweep's will tell.
            if self._age(event.processed_at) < 0:
                return Strand((), treated, others_wait=True)
            if event.id in awaited:
                calls[event.id] = event
            elif event.type == "user.tool_result":
                answered.add(event.tool_use_id)
                treated |= _is_ours(event) and self._age(event.processed_at) < stopped_for
            elif event.type == "user.custom_tool_result":
                answered.add(event.custom_tool_use_id)
                treated |= _is_ours(event) and self._age(event.processed_at) < stopped_for
            elif event.type == "user.tool_confirmation":
                verdicts[event.tool_use_id] = event.result
            elif event.type == "session.thread_status_terminated":
                ended_threads.add(event.session_thread_id)
        open_calls = awaited - answered
        # A call made since the items were listed may have a runner that was launched since.
        ours = [
            call
            for call in calls.values()
            if call.id in open_calls
            and call.session_thread_id not in ended_threads
            and self._is_ours_to_answer(call, verdicts)
            and self._age(call.processed_at) > STOPPED_SECONDS
        ]
        return Strand(tuple(ours), treated, others_wait=len(ours) < len(open_calls))

    def _is_ours_to_answer(self, event: Any, verdicts: dict[str, str]) -> bool:
        """A call that a runner would have run: of a custom tool of ours, or of the agent toolset and allowed, by a rule
        or by a person."""
        if event.type == "agent.custom_tool_use":
            return event.name in self._own_tools
        if event.type != "agent.tool_use" or event.name not in OWNED_TOOLS:
            return False
        permission = event.evaluated_permission
        return permission == "allow" or (permission == "ask" and verdicts.get(event.id) == "allow")


def _is_ours(result: Any) -> bool:
    return any(getattr(block, "text", None) == LOST for block in result.content or [])


def _error_result(call: Any) -> dict[str, Any]:
    answer: dict[str, Any] = {"is_error": True, "content": [{"type": "text", "text": LOST}]}
    if call.type == "agent.custom_tool_use":
        return {"type": "user.custom_tool_result", "custom_tool_use_id": call.id, **answer}
    return {"type": "user.tool_result", "tool_use_id": call.id, **answer}


def _server_time(date: str) -> datetime | None:
    """What the `Date` of an answer says. Without it no strand can be told: a host's own clock may be wrong."""
    try:
        told = parsedate_to_datetime(date)
    except ValueError:
        _log.warning(
            log.line("heal", reason="the API's answer has no usable Date: does a proxy remove it? Nothing is healed")
        )
        return None
    return told if told.tzinfo else told.replace(tzinfo=UTC)
