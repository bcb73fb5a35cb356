"""What a session's event log adds up to: which calls wait, for whom, and whether a turn is over (R4, R5).

The log is read in three ways, and folded by one class: whole, at the start and after the stop; its last page, before
each stop; and event by event as the SDK's worker gets them, through our middleware, so that a running tool is known by
its event and "nothing has happened for half an hour" needs no request of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from anthropic import APIConnectionError, AsyncAnthropic, NotFoundError

from . import runner_clock

OWNED_TOOLS = frozenset({"bash", "read", "write", "edit", "glob", "grep"})  # the SDK's agent toolset
_RECENT_EVENTS = 100
_RESULTS = ("user.tool_result", "user.custom_tool_result", "agent.tool_result")


@dataclass(frozen=True)
class Call:
    """One call the agent made, by the id of its event."""

    id: str
    name: str
    input: Mapping[str, Any]
    thread_id: str | None
    is_custom: bool

    def is_ours(self, custom_tools: Collection[str]) -> bool:
        """Whether it is known to be a runner's, before the SDK has asked for the tools."""
        return self.name in (custom_tools if self.is_custom else OWNED_TOOLS)

    def error(self, text: str) -> dict[str, Any]:
        """The event that answers it when it did not run to its end."""
        content = [{"type": "text", "text": text}]
        if self.is_custom:
            key, kind = "custom_tool_use_id", "user.custom_tool_result"
        else:
            key, kind = "tool_use_id", "user.tool_result"
        return {"type": kind, key: self.id, "is_error": True, "content": content}


class EventLog:
    """The fold. Takes events in the log's order; an event that comes twice, listed and streamed, counts once."""

    def __init__(self, settled: Collection[str] = (), now: Callable[[], float] = runner_clock.now) -> None:
        self.open: dict[str, Call] = {}
        """Calls that wait for a result and for nobody's word, in the order in which the SDK takes them up."""
        self.interrupted: dict[str, Call] = {}
        """Calls whose turn an interrupt ended. The log leaves them open, and nothing waits for them."""
        self.answered: set[str] = set()
        self.is_read = False
        """It has been read to its end once."""
        self.readings = 0
        """How often the SDK's worker has read it to its end."""
        self.turn: Literal["none", "running", "requires_action", "ended"] = "none"
        self._awaited: frozenset[str] = frozenset()
        self._held: dict[str, Call] = {}
        self._primary: str | None = None
        self._unprocessed: set[str] = set()
        self._has_new_input = False
        self._settled = settled  # calls known elsewhere as interrupted: their answers are no input
        self._seen: set[tuple[str, bool]] = set()
        self._now = now
        self._last_at = now()

    def note(self, event: Any) -> None:
        if not getattr(event, "id", None):
            return  # of a kind newer than this SDK
        is_waiting = event.type.startswith("user.") and getattr(event, "processed_at", None) is None
        if (event.id, is_waiting) in self._seen or (event.id, False) in self._seen:
            return
        self._seen.add((event.id, is_waiting))
        self.touch()
        if is_waiting:
            self._unprocessed.add(event.id)
            return
        self._unprocessed.discard(event.id)
        self._note_status(event)
        self._note_call(event)

    def touch(self) -> None:
        """Something has happened."""
        self._last_at = self._now()

    @property
    def quiet_seconds(self) -> float:
        """How long nothing has happened."""
        return self._now() - self._last_at

    @property
    def is_over(self) -> bool:
        """The session is gone, or its last turn has ended and nothing new has come since."""
        return self.turn == "ended" and not self._has_new_input and not self._unprocessed

    @property
    def waits_for(self) -> tuple[str, frozenset[str]]:
        """What the session's own last word was, and which calls it waits for."""
        return self.turn, self._awaited

    def only_waits(self, owned: Collection[str]) -> bool:
        """The session does nothing until somebody else does: a person with a word, another client with its tool's
        result, anybody with a first message. `owned` are the names of the tools that are ours to run."""
        if self.turn == "requires_action":
            return not any(call.id in self._awaited and call.name in owned for call in self.open.values())
        return self.is_over or (self.turn == "none" and not self._has_new_input and not self._unprocessed)

    def is_settled(self, event: Any) -> bool:
        """Whether the event is a call that an interrupt ended, or the answer to one. The SDK's worker must not see
        them: it would run the call, and count it as outstanding for ever when its answer is refused."""
        return getattr(event, "id", None) in self.interrupted or (
            event.type in _RESULTS and _answered_id(event) in self.interrupted
        )

    def _note_status(self, event: Any) -> None:
        if event.type == "session.status_idle":
            reason = getattr(event, "stop_reason", None)
            waits = getattr(reason, "type", None) == "requires_action"
            self.turn = "requires_action" if waits else "ended"
            self._awaited = frozenset(reason.event_ids if reason and waits else ())
            self._has_new_input = False
        elif event.type in ("session.status_running", "session.status_rescheduled"):
            self.turn = "running"
        elif event.type in ("session.status_terminated", "session.deleted"):
            self.turn, self._has_new_input = "ended", False
        elif event.type.startswith("session.thread_status_"):
            self._primary = self._primary or event.session_thread_id  # a log's first is the primary's (SDK)
            if event.type == "session.thread_status_terminated":
                for calls in (self.open, self._held):
                    for call in [call for call in calls.values() if call.thread_id == event.session_thread_id]:
                        del calls[call.id]  # no result is taken for it
        elif event.type.startswith("user.") and event.type != "user.tool_confirmation":
            known = event.type in _RESULTS and _answered_id(event) in (*self.interrupted, *self._settled)
            self._has_new_input |= not known

    def _note_call(self, event: Any) -> None:
        if event.type in ("agent.tool_use", "agent.custom_tool_use"):
            is_custom = event.type == "agent.custom_tool_use"
            call = Call(event.id, event.name, dict(event.input), event.session_thread_id, is_custom)
            permission = "allow" if is_custom else (event.evaluated_permission or "allow")
            if call.id not in self.answered and permission != "deny":
                (self.open if permission == "allow" else self._held)[call.id] = call
        elif event.type == "user.tool_confirmation":
            held = self._held.pop(event.tool_use_id, None)
            if held is not None and event.result == "allow":
                self.open[held.id] = held
        elif event.type in _RESULTS:
            self.answered.add(_answered_id(event))
            self.open.pop(_answered_id(event), None)
        elif event.type == "user.interrupt":
            for calls in (self.open, self._held):
                for call in list(calls.values()):
                    if event.session_thread_id in (None, call.thread_id or self._primary):
                        self.interrupted[call.id] = calls.pop(call.id)


async def read_log(api: AsyncAnthropic, session_id: str, log: EventLog | None = None) -> EventLog:
    """The whole log. Raises `anthropic.APIError`."""
    log = log or EventLog()
    async for event in api.beta.sessions.events.list(session_id, limit=1000):
        log.note(event)
    log.is_read = True
    return log


async def recent_log(api: AsyncAnthropic, session_id: str, settled: Collection[str] = ()) -> EventLog:
    """The log's last page: enough to know whether a turn is over. Raises `anthropic.APIError`."""
    log = EventLog(settled)
    page = await api.beta.sessions.events.list(session_id, order="desc", limit=_RECENT_EVENTS)
    for event in reversed(page.data):
        log.note(event)
    return log


async def turn_is_over(api: AsyncAnthropic, session_id: str, settled: Collection[str] = ()) -> bool:
    """True when the session is gone, or idle at the end of a turn with nothing new in its event log."""
    try:
        session = await api.beta.sessions.retrieve(session_id)
    except NotFoundError:
        return True
    if session.status == "terminated":
        return True
    return session.status == "idle" and (await recent_log(api, session_id, settled)).is_over


class HeardStream:
    """The SDK's event stream, of which every event is noted before the SDK's worker gets it.

    The SDK opens a stream, lists what came before, and reads on. When that list fails it reads on all the same, and
    would never see a call made before: such a stream breaks, so that it connects, and lists, again.
    """

    def __init__(self, stream: Any, log: EventLog) -> None:
        self._stream = stream
        self._log = log
        self._readings_before = log.readings

    async def __aenter__(self) -> HeardStream:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._stream.__aexit__(*raised)

    def __aiter__(self) -> HeardStream:
        return self

    async def __anext__(self) -> Any:
        if self._log.readings == self._readings_before:
            raise APIConnectionError(message="the event log was not read", request=self._stream.response.request)
        event = await self._stream.__anext__()
        self._log.note(event)
        return event


def _answered_id(result: Any) -> str:
    return str(result.custom_tool_use_id if result.type == "user.custom_tool_result" else result.tool_use_id)
