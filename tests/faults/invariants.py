"""What must be true of every schedule. Each violation begins with its label, `label: what happened`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, permutations
from math import inf
from typing import TYPE_CHECKING, Any

from shared.provider import Launch
from tests.faults import steps
from tests.faults.loop import Process
from tests.faults.steps import OWN_TOOL
from tests.faults.wire import Asked

if TYPE_CHECKING:
    from tests.faults.cloud import Box
    from tests.faults.play import World
    from tests.faults.runners import Execution

SKILL_OPERATIONS = ("skills.version", "skills.content")
LOOK_SECONDS = 25.0  # from a runner's last look at the log to its stop: a fence of a heartbeat, two slow answers
SILENCE_SECONDS = 590.0  # before healing takes a lease from whoever held it
KILL_SECONDS = 7.0  # P3 and R5: what a resumed runner still runs ends within a look of 1 s and a kill of 5 s
BEAT_SECONDS = 31.0  # the SDK's worker beats every 30 s, and only a beat tells a runner that its item was taken away
HOPELESS: dict[tuple[str, object], tuple[str, ...]] = {
    ("secret", "null"): ("lost", "slow", "endless"),
    ("secret", "undecodable"): ("lost", "slow", "endless"),
}
"""Servers on which sessions cannot be served, and what is therefore not asked of them."""
UNHEALED = ("environment_key_may_answer", False)
"""A server on which no strand can be ended: a session that nothing strands is served all the same."""
_STRANDING = (steps.KillRunner, steps.Terminate, steps.Vanish, steps.Suspend, steps.OperatorStop)
_OWNED = ("bash", "read", "write", "edit", "glob", "grep")


@dataclass(frozen=True)
class Stop:
    """A stop that a server granted: whose, and what it ended."""

    at: float
    asked_at: float
    by: Process
    session_id: str
    state_before: str
    had_work: bool
    looked: tuple[float, bool]
    """When its runner last read the event log before it asked for the stop, and whether there was work then."""
    holder: Process | None
    was_leaving: bool
    silence: float
    """How long nobody had beaten when the one who stops took the lease."""


def watch(world: World) -> None:
    """Records, at the server, what no log shows afterwards."""
    before: dict[int, tuple[str, bool]] = {}
    looks: dict[Process, list[tuple[float, bool]]] = {}
    beats: dict[str, float] = {}
    silences: dict[str, float] = {}

    def asked(request: Asked) -> None:
        world.asked.append(request)
        if request.operation == "work.stop":
            item = world.plane.item_by_id(request.path.split("/")[-2])
            if item is not None:
                before[id(request)] = (item.state, world.plane.has_work(item.session_id))

    def answered(request: Asked) -> None:
        if request.operation == "work.heartbeat" and request.status == 200:
            item = world.plane.item_by_id(request.path.split("/")[-2])
            if item is not None and json.loads(request.answer)["lease_extended"]:
                if "NO_HEARTBEAT" in request.query:
                    silences[item.session_id] = inf
                elif world.runners.holders.get(item.session_id) is not request.process:
                    silences[item.session_id] = world.loop.time() - beats.get(item.session_id, -inf)
                beats[item.session_id] = world.loop.time()
                world.runners.holders[item.session_id] = request.process
            if item is not None and "NO_HEARTBEAT" in request.query and json.loads(request.answer)["lease_extended"]:
                world.log(f"{request.process.name} claims {name_of(world, item.session_id)}")
        if request.operation == "events.list":
            look = (world.loop.time(), world.plane.has_work(request.path.split("/")[3]))
            looks.setdefault(request.process, []).append(look)
        if request.operation == "work.stop" and request.status in (200, 204):
            item = world.plane.item_by_id(request.path.split("/")[-2])
            if item is not None:
                state, had_work = before[id(request)]
                run = world.runners.by_process.get(request.process)
                leaving = run is not None and run.process.was_told_to_leave
                holder = world.runners.holders.get(item.session_id)
                earlier = [look for look in looks.get(request.process, []) if look[0] <= request.at]
                looked = earlier[-1] if earlier else (0.0, True)
                by, at = request.process, world.loop.time()
                silence = silences.get(item.session_id, inf)
                world.stops.append(
                    Stop(at, request.at, by, item.session_id, state, had_work, looked, holder, leaving, silence)
                )
                world.log(f"{request.process.name} stops {name_of(world, item.session_id)} ({state}, work={had_work})")

    def launched(launch: Launch) -> None:
        texts = [launch.stdin.decode(), *os.environ.values(), *(text.decode() for text in launch.files.values())]
        if any(key in text for key in world.keys for text in texts):
            world.planted.append("the environment key is in reach of a sandbox")

    world.network.on_asked = asked
    world.network.on_answered = answered
    world.cloud.on_launch = launched


def name_of(world: World, session_id: str) -> str:
    return next((f"session {index}" for index, id_ in world.sessions.items() if id_ == session_id), session_id)


def is_settled(world: World, session_id: str) -> bool:
    """Nothing waits, and nobody holds it."""
    session, item = world.plane.truth(session_id), world.plane.item(session_id)
    if session is None:
        return True
    if world.plane.has_work(session_id):
        return False
    return item is None or item.state == "stopped"


def is_quiet(world: World) -> bool:
    """Whether nothing will happen any more."""
    runs = any(box.alive() for box in world.cloud.everything)
    return not runs and all(is_settled(world, session_id) for session_id in world.sessions.values())


def orphans(world: World) -> list[Box]:
    """Sandboxes that are not their session's: not the one that the provider would find for it, nor, where it knows of
    none, the oldest, which it would find by what it is labelled with."""
    owners = set(world.cloud.store.values())
    found: list[Box] = []
    for session_id in {box.session_id: None for box in world.cloud.boxes.values()}:
        boxes = world.cloud.of_session(session_id)
        owner = next((box for box in boxes if box.id in owners), min(boxes, key=lambda box: box.created_at))
        found += [box for box in boxes if box is not owner]
    return found


def is_beyond_healing(world: World, index: int) -> bool:
    """Whether the session met something that takes a runner from it, on a server where nobody may answer for one."""
    if UNHEALED not in world.schedule.switches:
        return False
    runs = [world.runners.by_process.get(hit.process) for hit in world.network.hits]
    has_met = any(run is not None and run.box.session_id == world.sessions[index] for run in runs)
    return has_met or any(isinstance(step, _STRANDING) and step.session == index for step in world.schedule.steps)


def check(world: World) -> list[str]:
    """Every broken invariant: its label, and what happened."""
    return [
        *_ends(world),
        *(f"crashed: {text}" for text in (*world.runners.crashes, *world.hosts.crashes, *world.network.crashes)),
        *(f"bug: {text}" for text in dict.fromkeys(world.bugs)),
        *(f"planted: {text}" for text in dict.fromkeys(world.planted)),
        *(f"crowd: {text}" for text in world.runners.crowds),
        *_executions(world),
        *_skills(world),
        *_acks(world),
        *_stops(world),
        *_cures(world),
        *_credentials(world),
        *_refusals(world),
    ]


def _ends(world: World) -> Iterable[str]:
    """P1: every turn is over, and nothing is left of anybody who worked on it."""
    for index, session_id in world.sessions.items():
        session, item = world.plane.truth(session_id), world.plane.item(session_id)
        state = item.state if item else "gone"
        if session is None or is_settled(world, session_id):
            continue
        if world.plane.has_work(session_id):
            if is_beyond_healing(world, index):
                continue
            waits = session.pending_ids() or "its next turn"
            yield f"lost: session {index} is not over: {session.status}, waits for {waits}, its item is {state}"
        else:
            yield f"endless: session {index} is over and its item is {state}"
    for box in world.cloud.everything:
        if box.alive():
            yield f"endless: {box.alive()[0].process.name} of {name_of(world, box.session_id)} never ends"
    for box in orphans(world):
        yield f"ownerless: {box.id} of {name_of(world, box.session_id)} is not the session's, and nobody releases it"


def _executions(world: World) -> Iterable[str]:
    """P2, P3."""
    executions = world.runners.executions
    for marker, count in Counter(execution.marker for execution in executions).items():
        runs = [execution for execution in executions if execution.marker == marker]
        if count > 1:
            who = ", ".join(run.run.process.name for run in runs)
            for label in dict.fromkeys(_again(world, one, other) for one, other in pairwise(runs)):
                yield f"{label}: call {marker} was executed {count} times, by {who}"
    for execution in executions:
        if not execution.held_lease:
            label = "forced" if _is_after_forced_stop(world, execution) else "loser"
            who = execution.run.process.name
            yield f"{label}: call {execution.marker} was executed by {who}, not holding the lease"
    for one, other in permutations(executions, 2):
        if one.run is other.run or one.run.box.session_id != other.run.box.session_id or one.began > other.began:
            continue
        if _active_until(world, one) - KILL_SECONDS > other.began:
            names = f"{one.run.process.name} and {other.run.process.name}"
            is_known = any(not each.held_lease and _is_after_forced_stop(world, each) for each in (one, other))
            yield f"{'forced' if is_known else 'overlap'}: {names} execute {one.marker} and {other.marker} at once"


def _again(world: World, one: Execution, other: Execution) -> str:
    """What it is called that the second ran the call of the first: by what became of the first one's disk."""
    box, at = one.run.box, other.began
    if box is other.run.box:
        return "twice"
    if box.gone_at is not None and box.gone_at <= at:
        return "twice on two disks"
    is_forgotten = box.forgotten_at is not None and box.forgotten_at <= at
    if is_forgotten and (box.was_suspended(at) or not one.run.process.is_alive_at(at)):
        return "twice beside a forgotten disk"
    if is_forgotten and _is_after_forced_stop(world, other):
        return "forced"
    return "twice"


def _is_after_forced_stop(world: World, execution: Execution) -> bool:
    """Whether an operator took the item away, without asking, less than a beat before the call."""
    return any(
        step.force
        and world.sessions.get(step.session) == execution.run.box.session_id
        and step.at <= execution.began < step.at + BEAT_SECONDS
        for step in world.schedule.steps
        if isinstance(step, steps.OperatorStop)
    )


def _active_until(world: World, execution: Execution) -> float:
    """A suspended process executes nothing: what it began counts up to the suspension."""
    index = next(index for index, id_ in world.sessions.items() if id_ == execution.run.box.session_id)
    suspensions = [
        step.at + KILL_SECONDS
        for step in world.schedule.steps
        if isinstance(step, steps.Suspend) and step.session == index and step.at >= execution.began
    ]
    ended = execution.ended if execution.ended is not None else world.loop.time()
    return min([ended, *suspensions])


def _skills(world: World) -> Iterable[str]:
    """R12: the agent has its skill from its first call on, whoever may read it. One that no request could get, it has
    not: that keeps nobody from working."""
    for step in world.schedule.steps:
        asks_in_vain = isinstance(step, steps.Wire) and step.operation in (*SKILL_OPERATIONS, "sessions.get", "*")
        if asks_in_vain or isinstance(step, steps.RotateKey):
            return
    with_skill = {
        world.sessions.get(step.session)
        for step in world.schedule.steps
        if isinstance(step, steps.Create) and step.has_skill
    }
    for execution in world.runners.executions:
        if execution.run.box.session_id in with_skill and not execution.had_skill:
            yield f"skill: call {execution.marker} was executed in {execution.run.box.id} without the session's skill"


def _acks(world: World) -> Iterable[str]:
    """P2: an item is acked by the runner that is about to claim it, and by nobody else."""
    hosts = {ack.process.name for ack in world.asked if ack.operation == "work.ack"}
    for name in sorted(name for name in hosts if name.startswith("dispatcher")):
        yield f"early ack: {name} acked an item"


def _stops(world: World) -> Iterable[str]:
    """P10."""
    for stop in world.stops:
        name = name_of(world, stop.session_id)
        is_operators = stop.state_before == "stopping"
        if stop.holder is not stop.by and not is_operators:
            yield f"blind: at {stop.at:.1f} {stop.by.name} stopped {name}, whose lease it does not hold"
        is_host = stop.by.name.startswith("dispatcher")
        looked_at, saw_work = stop.looked
        # What comes after the last look, nobody can see: a stop is unfenced.
        has_looked = stop.asked_at - looked_at < LOOK_SECONDS and not saw_work
        if is_host and not is_operators and stop.silence < SILENCE_SECONDS:
            yield f"blind: at {stop.at:.1f} {stop.by.name} freed {name}, which was beaten {stop.silence:.0f} s before"
        if stop.had_work and not (has_looked or is_operators or stop.was_leaving or is_host):
            yield f"unguarded: at {stop.at:.1f} {stop.by.name} stopped {name} while it has work"


def _cures(world: World) -> Iterable[str]:
    """R9: only what is ours is answered, once, and an interrupt never comes without the answers."""
    cured: Counter[str] = Counter()
    for request in world.asked:
        session = world.plane.truth(request.path.split("/")[3]) if request.operation == "events.send" else None
        if session is None or request.bearer not in world.keys:
            continue
        events = json.loads(request.body)["events"]
        for event in events:
            answered = event.get("tool_use_id") or event.get("custom_tool_use_id")
            made = next((each for each in session.log if each["id"] == answered), None)
            if event["type"] == "user.interrupt" and len(events) == 1:
                yield f"interrupt: healing interrupted {name_of(world, session.id)} without an answer"
            elif event["type"] != "user.interrupt" and (made is None or not is_ours(made, session.log)):
                yield f"foreign cure: healing answered {made}, which is not ours to answer"
            elif answered and request.status == 200:
                cured[answered] += 1
    for call_id, count in cured.items():
        if count > 1 and world.schedule.switch("duplicate_tool_result") != 200:
            yield f"second cure: {call_id} was cured {count} times"


def is_ours(made: dict[str, Any], log: list[dict[str, Any]]) -> bool:
    """Whether the call is a runner's to answer."""
    if made["type"] == "agent.custom_tool_use":
        return bool(made["name"] == OWN_TOOL)
    if made["type"] != "agent.tool_use" or made["name"] not in _OWNED:
        return False
    verdicts = [each["result"] for each in log if each.get("tool_use_id") == made["id"] and "result" in each]
    permission = made["evaluated_permission"]
    return bool(permission == "allow" or (permission == "ask" and verdicts[-1:] == ["allow"]))


def _credentials(world: World) -> Iterable[str]:
    """P5."""
    users = {
        request.process.name
        for request in world.asked
        if request.process.name.startswith("runner") and request.bearer in world.keys
    }
    for name in sorted(users):
        yield f"planted: {name} uses the environment key"


def _refusals(world: World) -> Iterable[str]:
    """P5: without a session's own token nothing is launched."""
    if world.schedule.switch("secret") in ("null", "undecodable") and world.runners.by_process:
        yield "planted: a runner was started without a token of its own"
