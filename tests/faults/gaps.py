"""Bounded gaps: no session is left waiting longer than what went wrong explains (P1, P9).

What explains a silence is only what befell that session, or nobody's in particular, before it was over, and not so
long before it that it was over and done with. Requests and calls of the provider count where they met their trouble.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from tests.faults import steps
from tests.faults.cloud import DOOMED_SECONDS, Run
from tests.faults.invariants import is_beyond_healing, is_ours, name_of
from tests.faults.loop import EPOCH

if TYPE_CHECKING:
    from tests.faults.play import World

USUAL_SECONDS = 110.0  # the next sweep, and a launch
RECLAIM_SECONDS = 190.0  # an item that was handed out and not served: 120 s, and the next sweep
LAPSE_SECONDS = 620.0  # a lease that nobody gives back: up to 360 s, 60 s until it may be healed, a sweep, a launch
NEVER_SECONDS = 400.0  # more, where no lease lapses: healing frees the item 600 s after its last beat
TERMINATION_SECONDS = 120.0  # P9
_LEASE_REQUESTS = ("work.ack", "work.heartbeat", "work.stop", "events.send")


@dataclass(frozen=True)
class Trouble:
    """Something that may make one session wait so much longer."""

    at: float
    seconds: float
    until: float
    """When it has happened for the last time."""


@dataclass(frozen=True)
class Silence:
    """A time in which a call of ours waited, and how long of it nothing ran."""

    since: float
    until: float
    seconds: float


def troubles(world: World, session_id: str) -> list[Trouble]:
    """What befell the session."""
    index = next(index for index, id_ in world.sessions.items() if id_ == session_id)
    found = [*_of_the_wire(world, session_id), *_of_the_provider(world, session_id)]
    for step in world.schedule.steps:
        seconds = _allowance(world, session_id, step) if getattr(step, "session", index) == index else 0.0
        if seconds:
            found.append(Trouble(step.at, seconds, step.at + DOOMED_SECONDS))
    return found


def _allowance(world: World, session_id: str, step: steps.Step) -> float:
    match step:
        case steps.KillDispatcher(down_seconds=seconds) | steps.RotateKey(seconds=seconds):
            return RECLAIM_SECONDS + seconds
        case steps.KillRunner() | steps.Vanish():
            killed = [run for run in _killed(world, session_id) if (run.process.died_at or 0.0) >= step.at]
            # One that died before its ack has an item that is handed out again by itself.
            if not killed and isinstance(step, steps.KillRunner):
                return 0.0
            return LAPSE_SECONDS if any(_has_acked(world, run) for run in killed) else RECLAIM_SECONDS
        case steps.Terminate():
            return TERMINATION_SECONDS
        case steps.CutStream():
            return 15.0
        case steps.OperatorStop(force=False):
            return LAPSE_SECONDS  # where no runner is left to obey, it is completed after ten minutes
        case steps.OperatorStop() | steps.LoseStore():
            return RECLAIM_SECONDS
        case steps.Suspend(seconds=seconds):
            return LAPSE_SECONDS + seconds
        case _:
            return 0.0


def _of_the_wire(world: World, session_id: str) -> Iterator[Trouble]:
    """Each fault that a request of the session's runners has met, or one of any host."""
    for fault in {id(hit.fault): hit.fault for hit in world.network.hits}.values():
        met, has_lease = [], False
        for hit in world.network.hits:
            run = world.runners.by_process.get(hit.process)
            if hit.fault is fault and (run is None or run.box.session_id == session_id):
                met.append(hit.at)
                has_lease |= run is not None and hit.operation in _LEASE_REQUESTS
        if met:
            seconds = (LAPSE_SECONDS if has_lease else RECLAIM_SECONDS) + (60.0 + fault.seconds) * len(met)
            yield Trouble(min(met), seconds, max(met))


def _of_the_provider(world: World, session_id: str) -> Iterator[Trouble]:
    for hit in world.cloud.hits:
        if hit.session_id in (session_id, None):
            yield Trouble(hit.at, RECLAIM_SECONDS + hit.seconds, hit.at + hit.seconds)


def _killed(world: World, session_id: str) -> list[Run]:
    runs = [run for box in world.cloud.everything if box.session_id == session_id for run in box.runs]
    return [run for run in runs if run.exit is None and run.process.died_at is not None]


def _has_acked(world: World, run: Run) -> bool:
    """Whether its ack has reached the server."""
    return any(asked.operation == "work.ack" and asked.process is run.process for asked in world.asked)


def check(world: World) -> Iterable[str]:
    switches = dict(world.schedule.switches)
    for index, session_id in world.sessions.items():
        if is_beyond_healing(world, index):
            continue
        befell = troubles(world, session_id)
        late: list[tuple[float, str]] = []
        for silence in _silences(world, session_id):
            explains = [
                each for each in befell if each.at <= silence.until and each.until + each.seconds >= silence.since
            ]
            bound = USUAL_SECONDS + sum(each.seconds for each in explains)
            if explains and (
                switches.get("result_on_stopped_item") == "ignored" or switches.get("never_beaten") == "frozen"
            ):
                bound += LAPSE_SECONDS
            if explains and switches.get("lease_lapse") == "never":
                bound += NEVER_SECONDS
            if silence.seconds > bound:
                what = f"waited {silence.seconds:.0f} s from {silence.since:.0f} on, {bound:.0f} s explained"
                late.append((silence.seconds, f"slow: {name_of(world, session_id)} {what}"))
        if late:
            yield max(late)[1]


def _silences(world: World, session_id: str) -> Iterator[Silence]:
    """The times between two entries of the session's log in which a call of ours waited."""
    session = world.plane.truth(session_id)
    if session is None:
        return
    runs = [
        (execution.began, execution.ended or world.loop.time())
        for execution in world.runners.executions
        if execution.run.box.session_id == session_id
    ]
    before = 0.0
    ours = {event["id"] for event in session.log if is_ours(event, session.log)}
    waiting: set[str] = set()
    for event in [*session.log, None]:
        now = world.loop.time() if event is None else datetime.fromisoformat(event["processed_at"]).timestamp() - EPOCH
        if waiting & ours:
            ran = sum(max(0.0, min(end, now) - max(begin, before)) for begin, end in runs)
            yield Silence(before, now, now - before - ran)
        before = now
        if event is not None and event["type"] == "session.status_idle":
            waiting = set(event["stop_reason"].get("event_ids", ()))
        elif event is not None and event["type"] == "session.status_terminated":
            waiting = set()
