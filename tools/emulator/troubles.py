"""What a test makes go wrong: switches, faults, broken streams, troubled webhooks, a clock that is off."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from . import replies
from .clock import Clock, span
from .engine import Engine
from .faults import Cut, Fault, Faults, Kind
from .switches import Switches
from .webhook_faults import WebhookFault, WebhookFaultKind
from .webhooks import WebhookSender


@dataclass(frozen=True)
class Execution:
    """One run of a tool, as the tool itself reported it: the truth no server shows."""

    at: datetime
    call: str
    """The id of the call, or the tool's name."""
    runner: str
    """Whatever tells the reporters apart."""
    session_id: str | None
    lease_epoch: int | None
    """Which lease of the session's item the runner says it held, counted from 1."""
    actual_epoch: int | None
    """Which one was current when the report came in: a first beat begins the next. None without a session."""
    work_state: str | None
    """The state of the session's item at that moment."""


class Troubles:
    """The part of `Emulator` that brings trouble; what begins with `_` is the emulator's."""

    clock: Clock
    _engine: Engine
    _faults: Faults
    _webhooks: WebhookSender
    environment_id: str
    executions: list[Execution]

    # Open facts

    @property
    def switches(self) -> Switches:
        """The open facts as this emulator plays them."""
        return self._engine.switches

    def switch(self, **values: Any) -> None:
        """Play them differently from now on; ValueError for a name or a value that does not exist."""
        with self._engine.transact():
            self._engine.switches.change(values)

    # Faults

    def fault(
        self,
        operation: str,
        kind: Kind,
        count: int | None = 1,
        *,
        status: int = 500,
        seconds: float = 0.0,
        after: int = 0,
    ) -> Fault:
        """Arm a fault, see `Fault`. `operation` is a name of the request log, as `work.ack`, or `*`; `hits` of what
        is returned counts the requests that have met it. ValueError for what cannot be."""
        return self._faults.arm(Fault(operation, kind, count, status, seconds, after))

    def cut_stream(self, session_id: str | None = None, after_events: int = 0, count: int = 1) -> Cut:
        """Break the connection of an event stream, of this session or of any, after so many more events."""
        return self._faults.arm_cut(Cut(session_id, after_events, count))

    def webhook_fault(self, kind: WebhookFaultKind, count: int = 1, *, seconds: float = 0.0) -> WebhookFault:
        """Lose, delay, duplicate or reorder the next `count` webhooks, see `WebhookFault`."""
        fault = WebhookFault(kind, count, seconds)
        self._webhooks.faults.append(fault)
        return fault

    def faults(self) -> list[Fault | Cut | WebhookFault]:
        """What is armed and has not had all its hits."""
        return [*self._faults.armed(), *self._webhooks.faults]

    def disarm(self, fault_id: str) -> None:
        """One of them, by its `id`; KeyError when it is not armed, or not any more."""
        armed = [fault for fault in self._webhooks.faults if fault.id == fault_id]
        for fault in armed:
            self._webhooks.faults.remove(fault)
        if not armed and not self._faults.disarm(fault_id):
            raise KeyError(fault_id)

    def clear_faults(self) -> None:
        """Disarm all of them. What is already delayed or held back stays so."""
        self._faults.clear()
        self._webhooks.faults.clear()

    def skew(self, seconds: float) -> None:
        """Show clients a clock that is off by so much (0: right again): `date` headers, timestamps, webhooks.

        Leases and sleeps do not notice, and the methods of this object show the true time. ValueError when it is off by
        more than ten years.
        """
        skew = span(seconds, "skew")
        with self._engine.transact():
            self.clock.skew = skew

    # The queue and the truth

    def add_healthcheck(self, environment_id: str | None = None) -> dict[str, Any]:
        """Queue an item of the kind that workers must skip and force-stop; returns it."""
        with self._engine.transact() as now:
            item = self._engine.world.queue(environment_id or self.environment_id).add_healthcheck(now)
            self._engine.world.changes += 1
            return replies.work(item)

    def claim_and_die(self, session_id: str) -> dict[str, Any]:
        """Be a worker that claims the session's queued item, beats once and is never heard of again; returns it."""
        with self._engine.transact() as now:
            session = self._engine.world.session(session_id)
            queue = self._engine.world.queue(session.environment_id)
            item = queue.of_session(session_id)
            if item is None or item.state != "queued":
                raise ValueError(f"session {session_id} has no queued work item")
            queue.reserve(item, now)
            queue.ack(item.id, now)
            queue.heartbeat(item.id, now, None, None)
            self._engine.world.changes += 1
            return replies.work(item)

    def report_execution(
        self, call: str, runner: str, session_id: str | None = None, lease_epoch: int | None = None
    ) -> Execution:
        """What a wrapped tool calls, or posts, each time it really runs."""
        with self._engine.transact() as now:
            item = None
            if session_id is not None:
                session = self._engine.world.session(session_id)
                item = self._engine.world.queue(session.environment_id).of_session(session_id)
            epoch, state = (item.epoch, item.state) if item else (None, None)
            execution = Execution(now, call, runner, session_id, lease_epoch, epoch, state)
            self.executions.append(execution)
            self._engine.ring()
            return execution

    # Webhooks

    @property
    def webhook_url(self) -> str | None:
        return self._webhooks.url

    @property
    def webhook_disabled_reason(self) -> str | None:
        return self._webhooks.disabled_reason

    def enable_webhooks(self) -> None:
        """Enable an endpoint that was disabled, by hand; nothing is replayed."""
        self._webhooks.enable()

    def set_webhook_url(self, url: str | None) -> None:
        """Register an endpoint (or none); this also enables one that was disabled. Nothing is replayed."""
        self._webhooks.register(url)

    @property
    def webhooks_paused(self) -> bool:
        """While true, transitions send no webhook, as if it were lost."""
        return self._webhooks.is_paused

    @webhooks_paused.setter
    def webhooks_paused(self, is_paused: bool) -> None:
        self._webhooks.is_paused = is_paused
