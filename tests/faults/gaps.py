"""Bounded gaps: no session is left waiting longer than what went wrong explains (P1, P9)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from tests.faults import steps
from tests.faults.invariants import is_ours, name_of
from tests.faults.loop import EPOCH

if TYPE_CHECKING:
    from tests.faults.play import World

USUAL_SECONDS = 110.0  # the next sweep, and a launch
RECLAIM_SECONDS = 190.0  # an item that was handed out and not served: 120 s, and the next sweep
LAPSE_SECONDS = 620.0  # a lease that nobody gives back: up to 360 s, 60 s until it may be healed, a sweep, a launch
NEVER_SECONDS = 400.0  # more, where no lease lapses: healing frees the item 600 s after its last beat
TERMINATION_SECONDS = 120.0  # P9


def allowance(step: steps.Step) -> float:
    """How much longer one trouble may make a session wait."""
    match step:
        case steps.KillDispatcher(down_seconds=seconds) | steps.RotateKey(seconds=seconds):
            return RECLAIM_SECONDS + seconds
        case steps.Provider():
            return RECLAIM_SECONDS * step.count + step.seconds
        case steps.Terminate():
            return TERMINATION_SECONDS
        case steps.CutStream():
            return 15.0
        case steps.Wire(who="dispatcher"):
            return RECLAIM_SECONDS + (60.0 + step.seconds) * step.count
        case steps.Wire():
            return LAPSE_SECONDS + (60.0 + step.seconds) * step.count
        case steps.KillRunner() | steps.Vanish() | steps.OperatorStop() | steps.LoseStore() | steps.Interrupt():
            return LAPSE_SECONDS
        case steps.Suspend(seconds=seconds):
            return LAPSE_SECONDS + seconds
        case _:
            return 0.0


def check(world: World) -> Iterable[str]:
    bound = USUAL_SECONDS + sum(allowance(step) for step in world.schedule.steps)
    switches = dict(world.schedule.switches)
    if switches.get("result_on_stopped_item") == "ignored" or switches.get("never_beaten") == "frozen":
        bound += LAPSE_SECONDS
    if switches.get("lease_lapse") == "never":
        bound += NEVER_SECONDS
    for session_id in world.sessions.values():
        longest, at = _longest_silence(world, session_id)
        if longest > bound:
            yield f"slow: {name_of(world, session_id)} waited {longest:.0f} s from {at:.0f} on, {bound:.0f} s explained"


def _longest_silence(world: World, session_id: str) -> tuple[float, float]:
    """The longest time in which a call of ours waited and nothing ran; and when it began."""
    session = world.plane.truth(session_id)
    if session is None:
        return 0.0, 0.0
    runs = [
        (execution.began, execution.ended or world.loop.time())
        for execution in world.runners.executions
        if execution.run.box.session_id == session_id
    ]
    longest, since, before = 0.0, 0.0, 0.0
    ours = {event["id"] for event in session.log if is_ours(event, session.log)}
    waiting: set[str] = set()
    for event in [*session.log, None]:
        now = world.loop.time() if event is None else datetime.fromisoformat(event["processed_at"]).timestamp() - EPOCH
        if waiting & ours:
            ran = sum(max(0.0, min(end, now) - max(begin, before)) for begin, end in runs)
            if now - before - ran > longest:
                longest, since = now - before - ran, before
        before = now
        if event is not None and event["type"] == "session.status_idle":
            waiting = set(event["stop_reason"].get("event_ids", ()))
        elif event is not None and event["type"] == "session.status_terminated":
            waiting = set()
    return longest, since
