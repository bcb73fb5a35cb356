"""The threads of a session: its own, the primary one, and one for each sub-agent it called. Pure.

Documented in the SDK's types: a sub-agent's events are on its own stream; its status and its tool calls are also shown
on the primary one, the calls with `session_thread_id`, which is empty on the thread's own copy. Inferred: the sub-agent
works while its caller waits, one at a time, and has no sub-agents of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from .ids import new_id

Event = dict[str, Any]
INPUT_TOKENS = 100
OUTPUT_TOKENS = 20


@dataclass
class Meter:
    """What a session or a thread has used so far. Invented but steady: a model request costs one unit of each."""

    model_requests: int = 0
    active: timedelta = timedelta()
    running_since: datetime | None = None

    def start(self, now: datetime) -> None:
        self.running_since = self.running_since or now

    def stop(self, now: datetime) -> None:
        self.active += self._current(now)
        self.running_since = None

    def seconds(self, now: datetime) -> float:
        return (self.active + self._current(now)).total_seconds()

    def _current(self, now: datetime) -> timedelta:
        return now - self.running_since if self.running_since else timedelta()

    def usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.model_requests * INPUT_TOKENS,
            "output_tokens": self.model_requests * OUTPUT_TOKENS,
            "cache_read_input_tokens": 0,
            "cache_creation": {"ephemeral_1h_input_tokens": 0, "ephemeral_5m_input_tokens": 0},
            "active_seconds": self.active.total_seconds(),
        }


@dataclass
class Thread:
    """A sub-agent's thread. The session itself is its primary thread."""

    agent_name: str
    created_at: datetime
    updated_at: datetime
    id: str = field(default_factory=lambda: new_id("sthr"))
    status: str = "running"
    archived_at: datetime | None = None
    meter: Meter = field(default_factory=Meter)
    log: list[Event] = field(default_factory=list)

    def ended(self, status: str, now: datetime) -> None:
        self.status = status
        self.updated_at = now
        self.meter.stop(now)
