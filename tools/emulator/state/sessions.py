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

from tools.emulator.agents import Call, Step, ToolResult
from tools.emulator.clock import stamp

from .ids import new_id

Event = dict[str, Any]
TICK = timedelta(microseconds=1)


@dataclass
class OpenCall:
    """A tool call the session waits for. `is_confirmed` turns true at once for a call that needs no confirmation."""

    id: str
    call: Call
    is_confirmed: bool


@dataclass
class Turn:
    """How far the agent is with one user message."""

    steps: deque[Step]
    results: list[ToolResult] = field(default_factory=list)
    open_calls: dict[str, OpenCall] = field(default_factory=dict)
    model_request_id: str | None = None
    resumes_at: datetime | None = None


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
    model_requests: int = 0
    active: timedelta = timedelta()
    running_since: datetime | None = None
    log: list[Event] = field(default_factory=list)
    inbox: deque[Event] = field(default_factory=deque)
    broadcast: list[Event] = field(default_factory=list)
    """Everything a live stream has been sent: a message twice, first unprocessed."""
    _last_stamp: datetime | None = None

    def events(self) -> list[Event]:
        return [*self.log, *self.inbox]

    def emit(self, type_: str, now: datetime, **fields: Any) -> Event:
        """Write an event of the server's own."""
        return self.record({"id": new_id("sevt"), "type": type_, **fields}, now)

    def record(self, event: Event, now: datetime) -> Event:
        """Write an event as processed now."""
        self._last_stamp = max(now, self._last_stamp + TICK) if self._last_stamp else now
        event = {**event, "processed_at": stamp(self._last_stamp)}
        self.log.append(event)
        self.broadcast.append(event)
        return event

    def queue(self, event: Event) -> Event:
        """Take a message whose turn has not come."""
        event = {**event, "processed_at": None}
        self.inbox.append(event)
        self.broadcast.append(event)
        return event

    def pending_ids(self) -> list[str]:
        return list(self.turn.open_calls) if self.turn else []

    def usage(self) -> dict[str, Any]:
        """Invented but steady numbers: one model request costs one unit of each."""
        return {
            "input_tokens": self.model_requests * INPUT_TOKENS,
            "output_tokens": self.model_requests * OUTPUT_TOKENS,
            "cache_read_input_tokens": 0,
            "cache_creation": {"ephemeral_1h_input_tokens": 0, "ephemeral_5m_input_tokens": 0},
            "active_seconds": self.active.total_seconds(),
        }


INPUT_TOKENS = 100
OUTPUT_TOKENS = 20


def text_of(content: Sequence[dict[str, Any]]) -> str:
    return "\n".join(block["text"] for block in content if block["type"] == "text")
