"""The real runner, `shared.sandbox_runner`, as a process of the virtual loop, and the tool that its agent calls.

What is replaced is what a process would have to itself: its output, its directories, its child processes, its wire and
how long it takes to boot. Everything from reading the job to the exit code is the product's.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from anthropic import AsyncAnthropic
from anthropic.lib.tools import BetaAsyncBuiltinFunctionTool

from shared import runner_claim, runner_process, sandbox_runner, staging
from shared.runner_job import read_job
from shared.runner_lock import Lock
from tests.faults.cloud import Cloud, Run
from tests.faults.loop import CURRENT, Process, VirtualLoop
from tests.faults.steps import OWN_TOOL, SKILL_FILE
from tests.faults.wire import Network, client_for, current_process

BOOT_SECONDS = 1.0  # from the start of the process to its first look at the lock
LOAD_SECONDS = 1.5  # what loading the SDK takes
TOOLS = f"{__name__}:tools"


@dataclass(eq=False)
class Execution:
    """One run of a tool, from its first to its last moment."""

    marker: str
    run: Run
    began: float
    ended: float | None = None
    held_lease: bool = False
    """Whether the server's lease was this runner's when it began."""
    had_skill: bool = False
    """Whether the session's skill lay where the agent looks for it."""


class Runners:
    """All runners of a schedule."""

    def __init__(self, loop: VirtualLoop, network: Network, cloud: Cloud) -> None:
        self.executions: list[Execution] = []
        self.crashes: list[str] = []
        self.crowds: list[str] = []
        self.by_process: dict[Process, Run] = {}
        self.holders: dict[str, Process] = {}
        """By session: whose claim the server has recorded last."""
        self._loop, self._network, self._cloud = loop, network, cloud
        cloud.start_runner = self.start

    def start(self, run: Run) -> None:
        self.by_process[run.process] = run
        run.process.on_death.append(lambda: self._close_executions(run))
        run.process.spawn(self._main(run)).add_done_callback(lambda task: self._ended(run, task))

    async def _main(self, run: Run) -> tuple[int, str]:
        await asyncio.sleep(BOOT_SECONDS + run.boots_late_seconds)
        job = read_job(None, io.BytesIO(run.stdin), {})
        lock = Lock(run.box.directory / "state")
        run.process.on_death.append(lock.release)
        run.box.workspace.mkdir(exist_ok=True)
        try:
            return await sandbox_runner._serve(job, lock)
        finally:
            lock.release()

    def _ended(self, run: Run, task: asyncio.Task[tuple[int, str]]) -> None:
        """The process is over, and so is everything it left running."""
        if run.process.is_dead:
            return
        if task.cancelled() or (error := task.exception()) is not None:
            self.crashes.append(f"{run.process.name} of {run.box.session_id} ended with {error!r}")
            run.exit = (1, "crashed")
        else:
            run.exit = task.result()
        run.exited_at = self._loop.time()
        run.emit("exit", code=run.exit[0], reason=run.exit[1])
        run.process.die()

    def _close_executions(self, run: Run) -> None:
        for execution in self.executions:
            if execution.run is run and execution.ended is None:
                execution.ended = self._loop.time()

    # What a process has to itself

    def emit(self, event: str, **values: object) -> None:
        process = current_process()
        run = self.by_process[process]
        if not process.is_dead:
            run.emit(event, **values)
            if event == "ready":
                run.is_ready = True
                others = [other.process.name for other in run.box.alive() if other.is_ready and other is not run]
                self.crowds += [f"{process.name} is ready in {run.box.id}, where {name} works" for name in others]

    def workdir(self) -> Path:
        return self.by_process[current_process()].box.workspace

    def terminate(self, pid: int) -> None:
        if process := self._process(pid):
            process.signal(signal.SIGTERM)

    def kill_tree(self, pid: int) -> None:
        if process := self._process(pid):
            process.die()

    def _process(self, pid: int) -> Process | None:
        return next((process for process in self.by_process if process.pid == pid), None)

    def client(self, **options: Any) -> AsyncAnthropic:
        return AsyncAnthropic(http_client=client_for(self._network, current_process()), **options)

    async def execute(self, command: str) -> str:
        marker, _, seconds = command.partition(" ")
        process = current_process()
        run = self.by_process[process]
        if process.is_dead:  # the schedule is over
            return ""
        holds = self.holders.get(run.box.session_id) is process
        had_skill = (run.box.workspace / SKILL_FILE).is_file()
        execution = Execution(marker, run, self._loop.time(), held_lease=holds, had_skill=had_skill)
        self.executions.append(execution)
        try:
            await asyncio.sleep(float(seconds))
        finally:
            if execution.ended is None:
                execution.ended = self._loop.time()
        return f"done {marker}"

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The runner's modules work with these runners."""
        replaced: tuple[tuple[Any, str, Any], ...] = (
            (sandbox_runner, "emit", self.emit),
            (sandbox_runner, "workdir", self.workdir),
            (sandbox_runner, "_SIGNAL_SECONDS", LOAD_SECONDS),
            (runner_process, "terminate", self.terminate),
            (runner_process, "kill_tree", self.kill_tree),
            (runner_process, "kill_descendants", lambda root=None: 0),
            (runner_process, "_processes", list),
            (runner_claim, "AsyncAnthropic", self.client),
            (staging, "AsyncAnthropic", self.client),
        )
        _here.append(self)
        try:
            with contextlib.ExitStack() as patches:
                for module, name, value in replaced:
                    patches.enter_context(mock.patch.object(module, name, value))
                yield
        finally:
            _here.pop()


_here: list[Runners] = []


class Bash(BetaAsyncBuiltinFunctionTool):
    """The agent's shell: it takes its time and remembers that it ran."""

    name = "bash"

    def to_dict(self) -> Any:
        return {"type": "bash_20250124", "name": self.name}

    async def call(self, input: object) -> str:
        assert isinstance(input, dict)
        return await _here[-1].execute(str(input["command"]))


class Own(Bash):
    """A custom tool of ours, which does the same."""

    name = OWN_TOOL


def tools(_context: object) -> list[Any]:
    """What SANDBOX_TOOLS names: of two tools of one name, the SDK calls the later."""
    assert CURRENT.get() is not None
    return [Bash(), Own()]
