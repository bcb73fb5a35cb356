"""What the runner's tests share: a job from a real poll, a session in this process, a runner in its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from anthropic import AsyncAnthropic
from anthropic.types.beta.environments import BetaSelfHostedWork

from shared.runner_events import EventLog
from shared.runner_job import RunnerJob, parse_job
from shared.runner_journal import Journal
from shared.runner_lease import Lease
from shared.runner_lock import Lock
from shared.runner_session import Exit, Session
from shared.runner_tools import Guard, ToolFactory, load_custom_tools
from tools.emulator import Emulator

T = TypeVar("T")
RUNNER = Path(__file__).resolve().parents[2] / "shared" / "sandbox_runner.py"
PATIENCE_SECONDS = 60.0  # a hung test ends here; nothing waits this long when it works
NO_TOOLS: ToolFactory = load_custom_tools(None)


async def until(emulator: Emulator, predicate: Callable[[], T]) -> T:
    """The predicate's first true value, asked again whenever the emulator changes."""
    return await asyncio.to_thread(emulator.wait_until, predicate, PATIENCE_SECONDS)


async def wait_idle(emulator: Emulator, session_id: str) -> None:
    await asyncio.to_thread(emulator.wait_idle, session_id, PATIENCE_SECONDS)


async def eventually(predicate: Callable[[], T], within: float = PATIENCE_SECONDS) -> T:
    """The predicate's first true value, of something that rings no bell: a file, a process."""

    def look() -> T:
        deadline = time.monotonic() + within
        while not (value := predicate()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {within} s")
            time.sleep(0.02)
        return value

    return await asyncio.to_thread(look)


async def wait_file(path: Path) -> str:
    """The text of a file that a tool is about to write."""
    return await eventually(lambda: (path.exists() and path.read_text()) or "")


async def poll(emulator: Emulator) -> BetaSelfHostedWork:
    """The next hand-out, as the dispatcher gets it; also of an item that was handed out and not acked yet."""
    async with AsyncAnthropic(auth_token=emulator.environment_key, base_url=emulator.url) as client:
        item = await client.beta.environments.work.poll(emulator.environment_id, reclaim_older_than_ms=1)
    assert item is not None
    return item


async def job_values(emulator: Emulator, url: str, **changes: str) -> dict[str, str]:
    """The job of the next hand-out, as its runner gets it on stdin."""
    item = await poll(emulator)
    return {
        "ANTHROPIC_SESSION_ID": item.data.id,
        "ANTHROPIC_WORK_ID": item.id,
        "ANTHROPIC_ENVIRONMENT_ID": item.environment_id,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_WORK_SECRET": item.secret or "",
        "SANDBOX_MAX_IDLE_SECONDS": "0.1",
        **changes,
    }


def texts(emulator: Emulator, session_id: str) -> list[str]:
    """What the agent said."""
    said = emulator.events(session_id, "agent.message")
    return [block["text"] for event in said for block in event["content"]]


def results(emulator: Emulator, session_id: str) -> list[str]:
    """The texts of the results that were posted, in order."""
    posted = emulator.events(session_id, "user.tool_result", "user.custom_tool_result")
    return ["".join(block["text"] for block in event["content"]) for event in posted]


def operations(emulator: Emulator, *names: str) -> list[str]:
    """The emulator's log: the operations of runners in order, or those of the given names."""
    done = [record.operation for record in emulator.requests if record.operation and record.operation != "work.poll"]
    return [operation for operation in done if not names or operation in names]


class InProcess:
    """The runner's session in this process: everything but the process itself."""

    def __init__(self, job: RunnerJob, directory: Path, **options: Any) -> None:
        self.lines: list[dict[str, Any]] = []
        self.kills = 0
        self.on_first_kill: Callable[[], object] = lambda: None
        self.leaving = asyncio.Event()
        self.lock = Lock(directory / "state")
        assert self.lock.try_take()
        workdir = directory / "workspace"
        workdir.mkdir(exist_ok=True)
        self.session = Session(
            job,
            lock=self.lock,
            leaving=self.leaving,
            workdir=workdir,
            emit=lambda event, **values: self.lines.append({"event": event, **values}),
            kill=self._kill,
            **{"settle_seconds": 0.3, "pause_seconds": 0.1, **options},
        )

    def _kill(self) -> None:
        if not self.kills:
            self.on_first_kill()
        self.kills += 1  # the shell dies with its tool; whole trees are for the tests with a process

    async def run(self, tools: ToolFactory = NO_TOOLS) -> Exit:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await self.session.run(tools)
        finally:
            self.lock.release()

    def start(self, tools: ToolFactory = NO_TOOLS) -> asyncio.Task[Exit]:
        return asyncio.create_task(self.run(tools))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]


async def in_process(emulator: Emulator, url: str, directory: Path, **options: Any) -> InProcess:
    """A session for the next hand-out. Options in capitals are the job's, the others the session's."""
    changes = {name: options.pop(name) for name in list(options) if name.isupper()}
    return InProcess(parse_job(await job_values(emulator, url, **changes)), directory, **options)


class Bench:
    """A guard with a tool or two, and no control plane."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.time = 0.0
        self.lines: list[dict[str, Any]] = []
        self.killed = 0
        self.leftovers_killed = 0
        self.leaving = asyncio.Event()
        self.lease = Lease(on_beat=lambda beat: None, now=lambda: self.time)
        self.lease.beaten("a", 300, sent_at=0.0)
        self.log = EventLog()
        self.guard = Guard(
            self.lease,
            self.leaving,
            self._emit,
            self._kill,
            kill_seconds=0.3,
            log=self.log,
            journal=journal or Journal(Path("/no/storage")),
            mark=lambda: self._kill_leftovers,
        )

    def _emit(self, event: str, **values: Any) -> None:
        self.lines.append(values)

    def _kill(self) -> None:
        self.killed += 1

    def _kill_leftovers(self) -> None:
        self.leftovers_killed += 1


class Runner:
    """A runner in its own process, as a host starts it."""

    def __init__(
        self, process: asyncio.subprocess.Process, output: asyncio.StreamReader, pipe: asyncio.ReadTransport
    ) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._pipe = pipe
        self._changed = asyncio.Condition()
        self._reading = asyncio.create_task(self._read(output))

    async def _read(self, output: asyncio.StreamReader) -> None:
        async for raw in output:
            async with self._changed:
                try:
                    self.lines.append(json.loads(raw))
                except ValueError:
                    self.noise.append(raw.decode())
                self._changed.notify_all()

    async def line(self, event: str) -> dict[str, Any]:
        """The first line of that kind, once it is there."""
        async with asyncio.timeout(PATIENCE_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self._find(event) is not None or self._find("exit") is not None)
        found = self._find(event)
        assert found is not None, (event, self.lines, self.noise)
        return found

    def _find(self, event: str) -> dict[str, Any] | None:
        return next((line for line in self.lines if line.get("event") == event), None)

    async def exit(self) -> tuple[int, str]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            code = await self.process.wait()
            await self._reading
        last = self._find("exit")
        return code, last["reason"] if last else "".join(self.noise)

    async def hang_up(self) -> None:
        """Closes the reading end of its output, as a host does that has gone."""
        self._pipe.close()
        await self._reading

    async def close(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()
        self._pipe.close()
        await self._reading


Start = Callable[..., Any]


@contextlib.asynccontextmanager
async def runners(directory: Path) -> AsyncIterator[Start]:
    """Starts runners of one sandbox, and ends what is left of them. `job` goes to stdin; `environ` is added."""
    started: list[Runner] = []
    for name in ("workspace", "state", "home"):
        (directory / name).mkdir(exist_ok=True)

    async def start(
        job: object = None,
        *arguments: str,
        runner: Path = RUNNER,
        prefix: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
    ) -> Runner:
        reading, writing = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *prefix,
            *(sys.executable, "-I", str(runner), *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=writing,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(directory / "home"),
                "SANDBOX_WORKDIR": str(directory / "workspace"),
                "SANDBOX_STATE_DIR": str(directory / "state"),
                **(environ or {}),
            },
        )
        os.close(writing)
        output = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(reading, "rb")
        )
        started.append(Runner(process, output, pipe))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(job if isinstance(job, bytes) else b"" if job is None else json.dumps(job).encode())
            process.stdin.close()
            await process.stdin.wait_closed()
        return started[-1]

    try:
        yield start
    finally:
        for runner in started:
            await runner.close()


def unprivileged(uid: int = 65534) -> tuple[str, ...]:
    """What to put before a command so that an ordinary user runs it. Empty when we are one.

    Where root's Python lies in a directory that only root may enter, the command gets a view of the file system in
    which that directory holds the Python and nothing else.
    """
    if os.getuid() != 0:
        return ()
    view: list[str] = []
    for path in dict.fromkeys(Path(name) for name in (sys.base_prefix, sys.prefix, str(RUNNER.parent))):
        closed = _closed_ancestor(path)
        if closed is None:
            continue
        if str(closed) not in view:
            view += ["--tmpfs", str(closed)]
        for above in reversed(path.parents):
            if above.is_relative_to(closed) and above != closed:
                view += ["--perms", "0755", "--dir", str(above)]
        view += ["--ro-bind", str(path), str(path)]
    bubble = ("bwrap", "--die-with-parent", "--dev-bind", "/", "/", *view) if view else ()
    return (*bubble, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all", "--")


def _closed_ancestor(path: Path) -> Path | None:
    """The topmost directory above `path` that others may not enter."""
    return next((above for above in reversed(path.parents) if not above.stat().st_mode & 0o001), None)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
