"""The provider of a schedule: sandboxes made of directories and virtual processes, and every kind of trouble.

What a call has begun goes on when its caller dies, as at a real provider.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import json
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import LaunchFailed
from shared.provider import Launch, SandboxInfo, Started, read_ready
from tests.faults.loop import EPOCH, Process, VirtualLoop
from tests.faults.numbers import number
from tests.faults.steps import Provider as Trouble

T = TypeVar("T")
PLATFORM_GRACE_SECONDS = 30.0
DOOMED_SECONDS = 60.0


@dataclass(eq=False)
class Run:
    """One runner process, as its sandbox knows it."""

    process: Process
    box: Box
    stdin: bytes
    output: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    exit: tuple[int, str] | None = None
    exited_at: float = 0.0
    is_ready: bool = False
    boots_late_seconds: float = 0.0

    @property
    def is_alive(self) -> bool:
        return self.exit is None and not self.process.is_dead

    def emit(self, event: str, **values: object) -> None:
        self.output.put_nowait(json.dumps({"event": event, **values}).encode() + b"\n")

    async def lines(self) -> AsyncIterator[bytes]:
        while (line := await self.output.get()) is not None:
            yield line


@dataclass(eq=False)
class Box:
    """One sandbox."""

    id: str
    session_id: str
    directory: Path
    created_at: float
    last_used_at: float
    runs: list[Run] = field(default_factory=list)
    is_suspended: bool = False
    is_ending: bool = False
    gone_at: float | None = None
    forgotten_at: float | None = None
    """When the provider, which still has it, began to take another one for its session's, or none."""
    suspended: list[tuple[float, float]] = field(default_factory=list)
    """From when to when, as far as it is over."""
    suspended_at: float = 0.0

    @property
    def is_gone(self) -> bool:
        return self.gone_at is not None

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"

    def alive(self) -> list[Run]:
        return [run for run in self.runs if run.is_alive]

    def was_suspended(self, at: float) -> bool:
        is_now = self.is_suspended and self.suspended_at <= at
        return is_now or any(since <= at < until for since, until in self.suspended)


@dataclass(frozen=True)
class Hit:
    """A call has met trouble: for one session, or for all."""

    at: float
    session_id: str | None
    seconds: float


class Cloud:
    """What all hosts' providers share."""

    def __init__(self, loop: VirtualLoop, seed: int, root: Path) -> None:
        self.boxes: dict[str, Box] = {}
        self.everything: list[Box] = []
        self.store: dict[str, str] = {}
        self.saved: dict[str, str] = {}
        self.troubles: list[Trouble] = []
        self.hits: list[Hit] = []
        self.start_runner: Callable[[Run], None] = lambda run: None
        self.on_launch: Callable[[Launch], None] = lambda launch: None
        self.doomed: dict[str, tuple[float, int, Callable[[Run], None]]] = {}
        """Sessions to whose next runners something happens: until when, at which of their steps, and what."""
        self._context = contextvars.copy_context()
        self._loop = loop
        self._seed = seed
        self._root = root
        self._numbers = itertools.count(1)
        self._calls = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()

    # What a host may ask

    async def begin(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs one call at the provider, where it outlives its caller."""
        task = self._loop.create_task(work, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be dead

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def pause(self, call: str, session_id: str | None = None) -> Trouble | None:
        """The time a call takes, and the trouble it meets."""
        await asyncio.sleep(0.2 + 1.5 * number(self._seed, call, next(self._calls)))
        trouble = next((each for each in self.troubles if each.call == call), None)
        if trouble is None:
            return None
        self.troubles.remove(trouble)
        self.hits.append(Hit(self._loop.time(), session_id, trouble.seconds))
        if trouble.count > 1:
            again = Trouble(trouble.at, trouble.call, trouble.kind, trouble.count - 1, trouble.seconds)
            self.troubles.insert(0, again)
        if trouble.kind == "slow" and call != "acquire":
            await asyncio.sleep(trouble.seconds)
        if trouble.kind in ("fail", "fail_for_good"):
            raise LaunchFailed(f"{call} failed", retriable=trouble.kind == "fail")
        return trouble

    async def acquire(self, session_id: str) -> tuple[Box, bool]:
        trouble = await self.pause("acquire", session_id)
        known = None if trouble is not None and trouble.kind == "forget" else self.store.get(session_id)
        box = self.boxes.get(known or "")
        created = box is None
        if box is not None and box.is_ending:
            raise LaunchFailed("the sandbox is shutting down", retriable=True)
        if trouble is not None and trouble.kind == "slow":
            await asyncio.sleep(trouble.seconds)  # after the look: somebody else may look, too, and create
        if box is None or box.is_gone:
            await asyncio.sleep(1.0)
            box = self._create(session_id)
            owner = self.boxes.get(self.store.get(session_id, ""))
            if owner is not None and not (trouble is not None and trouble.kind == "forget"):
                self.release_loser(box)
                box = owner
            else:
                self.remember({**self.store, session_id: box.id})
        if box.is_suspended:
            self.resume(box)
        box.last_used_at = EPOCH + self._loop.time()
        if trouble is not None and trouble.kind in ("half_done", "lie"):
            raise LaunchFailed("the answer of acquire was lost", retriable=True)
        return box, created

    async def start(self, box: Box, launch: Launch) -> Started:
        trouble = await self.pause("start", box.session_id)
        self.on_launch(launch)
        if box.is_gone or box.is_ending:
            raise LaunchFailed("the sandbox is gone", retriable=True)
        for path, content in launch.files.items():
            target = box.workspace / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if trouble is not None and trouble.kind == "lie":
            return Started("ready")
        run = Run(self._loop.process(f"runner {next(self._numbers)}"), box, launch.stdin)
        if trouble is not None and trouble.kind == "slow_boot":
            run.boots_late_seconds = trouble.seconds
        box.runs.append(run)
        run.process.on_death.append(lambda: run.output.put_nowait(None))
        if box.session_id in self.doomed:
            until, steps, happens = self.doomed[box.session_id]
            if self._loop.time() < until:
                run.process.after(max(1, steps), lambda: happens(run))
        self.start_runner(run)
        if trouble is not None and trouble.kind == "half_done":
            raise LaunchFailed("the answer of start was lost", retriable=True)
        return await read_ready(run.lines())

    def _create(self, session_id: str) -> Box:
        now = EPOCH + self._loop.time()
        id_ = f"box-{len(self.everything) + 1}"
        box = Box(id_, session_id, self._root / id_, now, now)
        self.boxes[id_] = box
        self.everything.append(box)
        return box

    # What happens to sandboxes

    def remember(self, store: dict[str, str]) -> None:
        """Which sandbox is whose from now on. What was somebody's and is not any more is forgotten."""
        for id_ in set(self.store.values()) - set(store.values()):
            if (box := self.boxes.get(id_)) and box.forgotten_at is None:
                box.forgotten_at = self._loop.time()
        self.store = store

    def doom(self, session_id: str, steps: int, happens: Callable[[Run], None]) -> None:
        """Something happens to the session's runners, those that start soon included, at their Nth step from now."""
        self.doomed[session_id] = (self._loop.time() + DOOMED_SECONDS, steps, happens)
        for box in self.of_session(session_id):
            for run in box.alive():
                run.process.after(steps, partial(happens, run))

    def of_session(self, session_id: str) -> list[Box]:
        return [box for box in self.boxes.values() if box.session_id == session_id]

    def release_loser(self, box: Box) -> None:
        """Somebody else was faster: theirs is the session's, and this one nobody's."""
        self.end(box)

    def end(self, box: Box) -> None:
        """Nothing of it is left."""
        for run in box.runs:
            run.process.die()
        box.gone_at = self._loop.time()
        self.boxes.pop(box.id, None)
        shutil.rmtree(box.directory, ignore_errors=True)

    async def terminate(self, box: Box, *, keeps_files: bool) -> None:
        if box.is_ending:
            return
        box.is_ending = True
        for run in box.alive():
            run.process.signal(signal.SIGTERM)
        await asyncio.sleep(PLATFORM_GRACE_SECONDS)
        for run in box.alive():
            run.process.die()
        box.is_ending = False
        if not keeps_files:
            self.end(box)

    def suspend(self, box: Box) -> None:
        box.is_suspended, box.suspended_at = True, self._loop.time()
        for run in box.runs:
            run.process.hold()

    def resume(self, box: Box) -> None:
        if box.is_suspended:
            box.is_suspended = False
            box.suspended.append((box.suspended_at, self._loop.time()))
            for run in box.runs:
                run.process.go_on()


class CloudSandbox:
    """A box, as the seam shows it."""

    def __init__(self, cloud: Cloud, box: Box, created: bool) -> None:
        self.id = box.id
        self.created = created
        self._cloud, self._box = cloud, box

    async def start(self, launch: Launch) -> Started:
        return await self._cloud.begin(self._cloud.start(self._box, launch))

    async def tail(self, lines: int) -> str:
        return ""


class CloudProvider:
    """One host's view of the cloud."""

    name = "cloud"

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def acquire(self, session_id: str) -> CloudSandbox:
        box, created = await self._cloud.begin(self._cloud.acquire(session_id))
        return CloudSandbox(self._cloud, box, created)

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        await asyncio.sleep(0.1)

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        await self._cloud.begin(self._cloud.pause("list"))
        for box in list(self._cloud.boxes.values()):
            yield SandboxInfo(box.session_id, box.id, box.created_at, box.last_used_at, bool(box.alive()))

    async def release(self, sandbox_id: str) -> None:
        await self._cloud.begin(self._cloud.pause("release"))
        if box := self._cloud.boxes.get(sandbox_id):
            self._cloud.end(box)
