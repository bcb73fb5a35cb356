"""What the page sees: two streams of server-sent events, one over everything, one of a session.

The first message is the whole, each later one what has changed since, at most ten a second. A row is compared by a few
numbers before it is built, so a thousand quiet sessions cost little.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Hashable, Iterator
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from starlette.responses import Response, StreamingResponse

from . import replies
from .clock import stamp
from .engine import Engine, wait_event
from .state import Event, Session, WorkItem
from .state.catalog import Environment
from .state.sessions import OpenCall
from .timeline import rounds
from .webhooks import Delivery

if TYPE_CHECKING:
    from .emulator import Emulator

Json = dict[str, Any]
PACE_SECONDS = 0.1
RECHECK_SECONDS = 1.0
KEEP_ALIVE_SECONDS = 15.0
LAST_DELIVERIES = 50
LAST_EVENTS = 1000


class Overview:
    """All sessions in a row each, the queues and who polls them, webhooks, faults, switches and the clock."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._prints: dict[str, Hashable] = {}
        self._parts: Json = {}

    def changes(self) -> Json:
        """What is different from last time."""
        message: Json = {}
        rows = self._rows()
        if rows:
            message["sessions"] = rows
        sessions = self._emulator._world.sessions
        if gone := [id_ for id_ in self._prints if id_ not in sessions]:
            message["gone"] = gone
            for id_ in gone:
                del self._prints[id_]
        for name, part in self._everything_else():
            if self._parts.get(name) != part:
                self._parts[name] = message[name] = part
        return message

    def _rows(self) -> list[Json]:
        world, rows = self._emulator._world, []
        for session in world.sessions.values():
            item = world.queue(session.environment_id).of_session(session.id)
            print_ = (len(session.log), len(session.inbox), item and _print_of(item))
            if self._prints.get(session.id) != print_:
                self._prints[session.id] = print_
                rows.append(_row(session, item))
        return rows

    def _everything_else(self) -> Iterator[tuple[str, Any]]:
        it = self._emulator
        now = it.now()
        yield "clock", {"advanced": it.clock.advanced.total_seconds(), "skew": it.clock.skew.total_seconds()}
        yield "environments", [_environment(each, now) for each in it._world.environments.values()]
        last = [_delivery(each) for each in it.deliveries[-LAST_DELIVERIES:]]
        yield "webhooks", {**webhooks(it), "last": last}
        yield "faults", [fault.shown() for fault in it.faults()]
        yield "switches", asdict(it.switches)


def webhooks(emulator: Emulator) -> Json:
    return {
        "url": emulator.webhook_url,
        "paused": emulator.webhooks_paused,
        "disabled_reason": emulator.webhook_disabled_reason,
    }


def _print_of(item: WorkItem) -> Hashable:
    return item.state, item.started_at, item.latest_heartbeat_at, item.stop_requested_at


def _row(session: Session, item: WorkItem | None) -> Json:
    calls = session.turn.open_calls.values() if session.turn else ()
    return {
        "id": session.id,
        "title": session.title,
        "created_at": stamp(session.created_at),
        "status": session.status,
        "events": len(session.log) + len(session.inbox),
        "open_calls": len(calls),
        "unconfirmed": sum(not call.is_confirmed for call in calls),
        "waiting_messages": len(session.inbox),
        "work": work(item) if item else None,
    }


def work(item: WorkItem) -> Json:
    """The work item with what no server shows: when its lease ends, and which lease it is."""
    return {
        "id": item.id,
        "state": item.state,
        "is_reserved": item.state == "queued" and item.started_at is not None,
        "expires_at": replies.optional_stamp(item.expires_at),
        "latest_heartbeat_at": replies.optional_stamp(item.latest_heartbeat_at),
        "epoch": item.epoch,
    }


def _environment(environment: Environment, now: datetime) -> Json:
    queue = environment.queue
    workers = sorted(queue.workers(now).items())
    return {
        "id": environment.id,
        "name": environment.name,
        "stats": queue.stats(now),
        "workers": [{"id": worker, "polled_at": stamp(seen)} for worker, seen in workers],
        "healthchecks": [work(item) for item in queue.healthchecks()],
    }


def _delivery(each: Delivery) -> Json:
    return {**asdict(each), "at": stamp(each.at), "is_ok": each.is_ok}


class Detail:
    """One session: itself, its item, its open calls, its rounds, and every event on it and on its threads."""

    def __init__(self, emulator: Emulator, session_id: str) -> None:
        self._emulator = emulator
        self._session: Session = emulator._world.session(session_id)
        self._parts: Json = {}
        self._sent: dict[str | None, int] = {}
        self._deliveries: list[Delivery] = []
        self._deliveries_seen = 0

    @property
    def is_gone(self) -> bool:
        return self._session.id not in self._emulator._world.sessions

    def changes(self) -> Json:
        message: Json = {}
        is_first = not self._sent
        latest = {event["id"]: event for event in self._fresh_events()}
        events = sorted(latest.values(), key=lambda event: event["processed_at"] or "~")
        if is_first and len(events) > LAST_EVENTS:
            message["events_left_out"] = len(events) - LAST_EVENTS
            events = events[-LAST_EVENTS:]
        if events:
            message["events"] = events
        for name, part in self._rest():
            if self._parts.get(name) != part:
                self._parts[name] = message[name] = part
        return message

    def _fresh_events(self) -> Iterator[Event]:
        """A message comes twice, first unprocessed; a call of a sub-agent too. Both times with the same id."""
        session = self._session
        yield from self._since(None, session.broadcast)
        for thread in session.threads.values():
            for event in self._since(thread.id, thread.log):
                yield {**event, "session_thread_id": thread.id}

    def _since(self, key: str | None, log: list[Event]) -> list[Event]:
        fresh = log[self._sent.get(key, 0) :]
        self._sent[key] = len(log)
        return fresh

    def _rest(self) -> Iterator[tuple[str, Any]]:
        it, session = self._emulator, self._session
        if self.is_gone:
            yield "is_deleted", True
            return
        item = it._world.queue(session.environment_id).of_session(session.id)
        self._deliveries += [each for each in it.deliveries[self._deliveries_seen :] if each.session_id == session.id]
        self._deliveries_seen = len(it.deliveries)
        yield "session", _row(session, item) | {"metadata": dict(session.metadata), "agent": session.agent["name"]}
        calls = session.turn.open_calls.values() if session.turn else ()
        names = {thread.id: thread.agent_name for thread in session.threads.values()}
        yield "threads", names
        yield "calls", [_call(each) for each in calls]
        yield "rounds", rounds(session, item, self._deliveries)


def _call(it: OpenCall) -> Json:
    call = {"id": it.id, "name": it.call.name, "input": it.call.input}
    return {**call, "is_custom": it.call.is_custom, "is_confirmed": it.is_confirmed}


def overview_stream(emulator: Emulator) -> Response:
    return _stream(emulator, Overview(emulator))


def session_stream(emulator: Emulator, session_id: str) -> Response:
    """NotFound for a session that does not exist; it ends when the session is deleted."""
    with emulator.hold():
        return _stream(emulator, Detail(emulator, session_id))


def _stream(emulator: Emulator, view: Overview | Detail) -> Response:
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return StreamingResponse(_frames(emulator, view), media_type="text/event-stream", headers=headers)


async def _frames(emulator: Emulator, view: Overview | Detail) -> AsyncIterator[str]:
    engine: Engine = emulator._engine
    quiet = 0.0
    with engine.listen() as changed:
        while not engine.is_closing:
            changed.clear()
            with emulator.hold() as now:
                message = view.changes()
            if message:
                quiet = 0.0
                yield f"data: {json.dumps({'now': stamp(now), **message})}\n\n"
                if message.get("is_deleted"):
                    return
                await asyncio.sleep(PACE_SECONDS)
            # What a test changes in its own thread, a fault or a switch, rings no bell.
            if not await wait_event(changed, RECHECK_SECONDS):
                quiet += RECHECK_SECONDS
                if quiet >= KEEP_ALIVE_SECONDS:
                    quiet = 0.0
                    yield ": still here\n\n"
