"""A session and its event log. Pure: no rule reads a clock.

The log holds wire events. It is ordered by `processed_at`, which grows by at least a microsecond from event to event
(recorded); messages that still wait for their turn come last, with `processed_at` null (documented).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from ..agents import Call, Step, ToolResult
from ..clock import stamp
from ..errors import NotFound
from .ids import new_id
from .threads import Event as Event
from .threads import Meter, Thread

TICK = timedelta(microseconds=1)


@dataclass
class OpenCall:
    """A tool call the session waits for. `is_confirmed` turns true at once for a call that needs no confirmation."""

    id: str
    call: Call
    is_confirmed: bool
    thread: Thread | None = None
    """The sub-agent's thread that made the call, if one did."""


@dataclass
class Turn:
    """How far the agent is with one user message."""

    steps: deque[Step]
    results: list[ToolResult] = field(default_factory=list)
    open_calls: dict[str, OpenCall] = field(default_factory=dict)
    model_request_id: str | None = None
    resumes_at: datetime | None = None
    thread: Thread | None = None
    """The sub-agent's thread that `steps` belong to, while one works."""
    callers_steps: deque[Step] = field(default_factory=deque)
    """What the primary thread goes on with when the sub-agent is done."""

    def come_back(self, result: ToolResult) -> None:
        """The sub-agent is done: the primary thread goes on, with this as the result of the delegation."""
        self.thread, self.steps, self.callers_steps = None, self.callers_steps, deque()
        self.results, self.open_calls, self.resumes_at = [result], {}, None


@dataclass
class Session:
    id: str
    environment_id: str
    agent: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    title: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    vault_ids: list[str] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    thread_id: str = field(default_factory=lambda: new_id("sthr"))
    status: str = "idle"
    archived_at: datetime | None = None
    script: deque[Step] = field(default_factory=deque)
    turn: Turn | None = None
    left_open: dict[str, OpenCall] = field(default_factory=dict)
    """Calls an interrupt left without a result: nothing waits for them, but a result is still taken (inferred)."""
    threads: dict[str, Thread] = field(default_factory=dict)
    """Those of sub-agents, in the order of their creation."""
    meter: Meter = field(default_factory=Meter)
    log: list[Event] = field(default_factory=list)
    inbox: deque[Event] = field(default_factory=deque)
    broadcast: list[Event] = field(default_factory=list)
    """Everything a live stream has been sent: a message twice, first unprocessed."""
    stirred: dict[str, None] = field(default_factory=dict)
    """Where it leaves its id when there is something for its streams."""
    _last_stamp: datetime | None = None

    def thread(self, thread_id: str) -> Thread:
        """The thread of a sub-agent."""
        if thread_id not in self.threads:
            raise NotFound(f"session {self.id} has no thread {thread_id}")
        return self.threads[thread_id]

    def events(self) -> list[Event]:
        return [*self.log, *self.inbox]

    def emit(self, type_: str, now: datetime, **fields: Any) -> Event:
        """Write an event of the server's own."""
        return self.record({"id": new_id("sevt"), "type": type_, **fields}, now)

    def emit_in(self, thread: Thread | None, type_: str, now: datetime, *, is_shown: bool, **fields: Any) -> Event:
        """Write an event on a thread's own stream, and on the primary one if it is shown there."""
        if thread is None:
            return self.emit(type_, now, **fields)
        event = {"id": new_id("sevt"), "type": type_, **fields, "processed_at": self._next_stamp(now)}
        thread.log.append(event)
        self.stirred[self.id] = None
        if is_shown:
            self._write({**event, "session_thread_id": thread.id})
        return event

    def record(self, event: Event, now: datetime, thread: Thread | None = None) -> Event:
        """Write an event as processed now; an answer to a thread's call on that thread's stream as well."""
        event = {**event, "processed_at": self._next_stamp(now)}
        if thread is not None:
            thread.log.append(event)
            event = {**event, "session_thread_id": thread.id}
        self._write(event)
        return event

    def _write(self, event: Event) -> None:
        self.log.append(event)
        self.broadcast.append(event)
        self.stirred[self.id] = None

    def _next_stamp(self, now: datetime) -> str:
        self._last_stamp = max(now, self._last_stamp + TICK) if self._last_stamp else now
        return stamp(self._last_stamp)

    def queue(self, event: Event) -> Event:
        """Take a message whose turn has not come."""
        event = {**event, "processed_at": None}
        self.inbox.append(event)
        self.broadcast.append(event)
        self.stirred[self.id] = None
        return event

    def pending_ids(self) -> list[str]:
        return list(self.turn.open_calls) if self.turn else []


def text_of(content: Sequence[dict[str, Any]]) -> str:
    return "\n".join(block["text"] for block in content if block["type"] == "text")
