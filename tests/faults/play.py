"""Plays one schedule, start to end, in virtual time, and returns what the invariants have to say about it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import random
import secrets
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from anyio._backends._asyncio import AsyncIOBackend

from tests.faults import gaps, invariants, steps
from tests.faults.cloud import Cloud, Run
from tests.faults.control_plane import ControlPlane
from tests.faults.hosts import RETENTION_SECONDS, Hosts
from tests.faults.loop import RanAway, VirtualLoop, virtual_time
from tests.faults.not_yet import NOT_YET
from tests.faults.numbers import number
from tests.faults.runners import Runners
from tests.faults.steps import OWN_TOOL, SKILL_NAME, Schedule
from tests.faults.story import story
from tests.faults.wire import Asked, Fault, Network
from tools.emulator import Step as AgentStep
from tools.emulator import call, custom, end, say
from tools.emulator import tools as together
from tools.emulator.errors import EmulatorError

SETTLE_SECONDS = 2400.0  # after the last step: two lapsed leases, healed one after the other, and more
HOPELESS_SECONDS = 1500.0  # where recovery is not to be seen; long enough for healing to do something wrong
RELEASE_SECONDS = RETENTION_SECONDS + 400.0  # once nobody uses it: a few sweeps, whose lists and releases may fail
CLIENT_SECONDS = 20.0  # how often the people and programs behind a session look what waits for them
LOOK_SECONDS = 5.0
_SKILL = f"---\nname: {SKILL_NAME}\ndescription: How we write.\n---\nPlainly.\n"


@dataclass
class World:
    """Everything of one schedule."""

    schedule: Schedule
    loop: VirtualLoop
    plane: ControlPlane
    network: Network
    cloud: Cloud
    runners: Runners
    hosts: Hosts
    sessions: dict[int, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    stops: list[invariants.Stop] = field(default_factory=list)
    operator_stopped: set[str] = field(default_factory=set)
    operator_stops: list[tuple[float, str]] = field(default_factory=list)
    terminated: set[str] = field(default_factory=set)
    planted: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    bells: list[tuple[float, str]] = field(default_factory=list)
    done_at: float = 0.0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def log(self, what: str) -> None:
        self.bells.append((self.loop.time(), what))

    def later(self, main: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(main, context=self.network.server.copy())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


@dataclass
class Outcome:
    """What a schedule came to."""

    schedule: Schedule
    violations: list[str]
    excused: list[str]
    """What `NOT_YET` has a reason for."""
    story: list[str]
    seconds: float
    """Of virtual time."""


def play(
    schedule: Schedule, *, breakage: Callable[[], contextlib.AbstractContextManager[None]] | None = None
) -> Outcome:
    """Plays it. `breakage` makes a broken build of the product for as long as it lasts."""
    _keep_what_is_loaded()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    loop = VirtualLoop()
    state = random.getstate()
    try:
        with virtual_time(loop), _determined(schedule.seed), (breakage or contextlib.nullcontext)():
            return loop.run_until_complete(_play(schedule, loop, root))
    except RanAway as error:
        return Outcome(schedule, [f"endless: {error}"], [], [], loop.time())
    finally:
        random.setstate(state)
        loop.close()
        shutil.rmtree(root, ignore_errors=True)


@functools.cache
def _keep_what_is_loaded() -> None:
    """Once: what is loaded by now stays, and is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _determined(seed: int) -> Iterator[None]:
    """The same luck in every run, nothing on another thread, and quiet loggers."""
    random.seed(seed)
    luck = random.Random(seed)  # noqa: S311 - a test's luck

    async def inline(
        _backend: Any, function: Callable[..., object], arguments: tuple[object, ...], **_options: object
    ) -> object:
        return function(*arguments)

    threads: Any = classmethod(inline)  # type: ignore[arg-type]
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(secrets, "token_hex", lambda size=16: luck.randbytes(size).hex()))
        patches.enter_context(mock.patch.object(AsyncIOBackend, "run_sync_in_worker_thread", threads))
        patches.enter_context(mock.patch.object(os, "fdatasync", return_value=None))  # no power is cut here
        patches.enter_context(mock.patch.object(gc, "freeze"))  # for a process of one runner; ours has thousands
        sdk = logging.getLogger("anthropic")
        level = sdk.level
        sdk.setLevel(logging.CRITICAL)  # it says in words what the product has to cope with
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            sdk.setLevel(level)


class _Bugs(logging.Handler):
    """What the product itself calls a bug: an error with a traceback."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.name.startswith("shared"):
            self._found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


async def _play(schedule: Schedule, loop: VirtualLoop, root: Path) -> Outcome:
    plane = ControlPlane(dict(schedule.switches))
    network = Network(loop, plane.app, schedule.seed)
    cloud = Cloud(loop, schedule.seed, root)
    runners = Runners(loop, network, cloud)
    hosts = Hosts(loop, network, cloud, plane, schedule)
    world = World(schedule, loop, plane, network, cloud, runners, hosts, keys=[plane.environment_key])
    invariants.watch(world)
    time_keeper = plane.open(loop)
    bugs = _Bugs(world.bugs)
    shared_logger = logging.getLogger("shared")
    shared_logger.addHandler(bugs)
    with runners.installed():
        hosts.start()
        world.later(_clients(world))
        for step in sorted(schedule.steps, key=lambda step: step.at):
            await asyncio.sleep(max(0.0, step.at - loop.time()))
            world.log(repr(step))
            _apply(step, world)
        await _settle(world)
        found = [*invariants.check(world), *gaps.check(world)]
        world.done_at = loop.time()
        for task in list(world.tasks):
            task.cancel()
        hosts.close()
        for process in loop.processes:
            await process.reap()
        await cloud.close()
        await network.close()
        plane.close()
        await time_keeper
    shared_logger.removeHandler(bugs)
    hopeless = {each for switch in schedule.switches for each in invariants.HOPELESS.get(switch, ())}
    excused = [text for text in found if label(text) in NOT_YET]
    violations = [text for text in found if label(text) not in NOT_YET and label(text) not in hopeless]
    return Outcome(schedule, violations, excused, story(world), world.done_at)


def label(violation: str) -> str:
    """Which invariant it broke."""
    return violation.partition(":")[0]


async def _settle(world: World) -> None:
    is_hopeless = any(switch in (*invariants.HOPELESS, invariants.UNHEALED) for switch in world.schedule.switches)
    deadline = world.loop.time() + (HOPELESS_SECONDS if is_hopeless else SETTLE_SECONDS)
    while world.loop.time() < deadline:
        await asyncio.sleep(LOOK_SECONDS)
        if world.runners.crashes or world.hosts.crashes:
            return
        if invariants.is_quiet(world):
            break
    # What the provider has forgotten is released in time, as whatever nobody uses.
    deadline = world.loop.time() + RELEASE_SECONDS
    while world.loop.time() < deadline:
        if not any(box.forgotten_at is not None for box in invariants.orphans(world)):
            return
        await asyncio.sleep(LOOK_SECONDS)


async def _clients(world: World) -> None:
    """Whoever confirms calls and answers custom ones does it, sooner or later."""
    while True:
        await asyncio.sleep(CLIENT_SECONDS)
        for index, session_id in list(world.sessions.items()):
            session = world.plane.truth(session_id)
            if session is None or session.turn is None:
                continue
            for open_call in list(session.turn.open_calls.values()):
                event: dict[str, object] | None = None
                if open_call.call.name == OWN_TOOL:
                    continue
                if open_call.call.is_custom:
                    event = {"type": "user.custom_tool_result", "custom_tool_use_id": open_call.id, "content": []}
                elif not open_call.is_confirmed:
                    allows = number(world.schedule.seed, "confirm", index, open_call.call.input["command"]) < 0.7
                    event = {
                        "type": "user.tool_confirmation",
                        "tool_use_id": open_call.id,
                        "result": "allow" if allows else "deny",
                    }
                if event is not None:
                    with contextlib.suppress(EmulatorError):
                        world.plane.send(session_id, event)


def _script(index: int, turns: tuple[steps.Turn, ...]) -> list[AgentStep]:
    script: list[AgentStep] = []
    for turn_number, turn in enumerate(turns):
        for group_number, group in enumerate(turn):
            calls = []
            for use_number, use in enumerate(group):
                marker = f"s{index}t{turn_number}g{group_number}c{use_number}"
                if use.kind == "custom":
                    calls.append(custom("ask_the_app", marker=marker))
                elif use.kind == "own":
                    calls.append(custom(OWN_TOOL, command=f"{marker} {use.seconds}"))
                else:
                    permission = "allow" if use.kind == "run" else use.kind
                    calls.append(call("bash", permission=permission, command=f"{marker} {use.seconds}"))
            script.append(together(*calls))
        script += [say(f"turn {turn_number} is over"), end()]
    return script


def _apply(step: steps.Step, world: World) -> None:
    session_id = world.sessions.get(getattr(step, "session", -1), "")
    boxes = world.cloud.of_session(session_id)
    with contextlib.suppress(EmulatorError, KeyError):  # as a client or an operator would be told
        match step:
            case steps.Create(session=index, turns=turns, has_skill=has_skill):
                skills = [world.plane.add_skill(SKILL_NAME, {"SKILL.md": _SKILL})] if has_skill else []
                world.sessions[index] = session_id = world.plane.create_session(skills=skills)
                world.plane.set_script(session_id, _script(index, turns))
            case steps.Message():
                world.plane.say(session_id, "go on")
            case steps.Interrupt():
                world.plane.send(session_id, {"type": "user.interrupt"})
            case steps.Archive():
                world.plane.archive_session(session_id)
            case steps.Delete():
                world.plane.delete_session(session_id)
            case steps.OperatorStop(force=force):
                world.operator_stops.append((world.loop.time(), session_id))
                world.plane.stop_work(session_id, force=force)
            case steps.Webhooks():
                world.hosts.troubles.append(step)
            case steps.KillDispatcher(host=host, steps=count, down_seconds=down):
                world.hosts.kill(world.hosts.all[host % len(world.hosts.all)], count, down)
            case steps.KillRunner(steps=count):
                world.cloud.doom(session_id, count, lambda run: run.process.die())
            case steps.Terminate(keeps_files=keeps_files, steps=None):
                for box in boxes:
                    world.later(world.cloud.terminate(box, keeps_files=keeps_files))
            case steps.Terminate(keeps_files=keeps_files, steps=int(count)):

                def end(run: Run) -> None:
                    world.later(world.cloud.terminate(run.box, keeps_files=keeps_files))

                world.cloud.doom(session_id, count, end)
            case steps.Vanish():
                for box in boxes:
                    world.cloud.end(box)
            case steps.Suspend(seconds=seconds):
                for box in boxes:
                    world.cloud.suspend(box)
                    world.loop.call_later(seconds, world.cloud.resume, box)
            case steps.Provider():
                world.cloud.troubles.append(step)
            case steps.SaveStore():
                world.cloud.saved = dict(world.cloud.store)
            case steps.LoseStore(restored=restored):
                world.cloud.remember(dict(world.cloud.saved) if restored else {})
            case steps.Wire(operation=operation, kind=kind, count=count, who=who, seconds=seconds, status=status):
                world.network.faults.append(Fault(operation, kind, count, who, seconds, status))
            case steps.CutStream():
                world.network.cut(session_id)
            case steps.Skew(seconds=seconds):
                world.plane.skew(seconds)
            case steps.RotateKey(seconds=seconds):
                world.keys.append(world.plane.rotate_key())
                for each in world.hosts.all:
                    world.hosts.kill(each, 0, seconds)
            case _:
                raise AssertionError(f"no such step: {step!r}")
