"""The smallest provider there is: the mapping in this process, a directory for a disk, plain processes for a sandbox.

The contract suite runs on it first. Its runners are the real `sandbox_runner.py` with the real SDK; nothing isolates
them, so it is for tests only. Faults are asked for by name (`fail_next`) and refused when unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from shared.errors import LaunchFailed
from shared.provider import Launch, SandboxInfo, Started, read_ready
from shared.session_store import MemorySessionStore

RUNNER = Path(__file__).resolve().parents[2] / "shared" / "sandbox_runner.py"
_FAULTS = ("acquire", "acquire_for_good", "start")
_CLAIM_SECONDS = 3600.0


class MemorySandbox:
    """One session's directory and the runners started in it."""

    def __init__(self, provider: MemoryProvider, directory: Path) -> None:
        self.id = directory.name
        self.created = True
        self.created_at = self.last_used_at = time.time()
        self.runners: list[asyncio.subprocess.Process] = []
        self._provider = provider
        self._directory = directory
        for name in ("workspace", "state"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    @property
    def workspace(self) -> Path:
        return self._directory / "workspace"

    @property
    def running(self) -> bool:
        return any(runner.returncode is None for runner in self.runners)

    async def start(self, launch: Launch) -> Started:
        self._provider.fault("start")
        for path, content in launch.files.items():
            target = self.workspace / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.workspace),
            "SANDBOX_WORKDIR": str(self.workspace),
            "SANDBOX_STATE_DIR": str(self._directory / "state"),
        }
        runner = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(self._provider.runner)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self.runners.append(runner)
        assert runner.stdin is not None
        assert runner.stdout is not None
        try:
            runner.stdin.write(launch.stdin)
            await runner.stdin.drain()
            runner.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died first; its output says why
        started = await read_ready(runner.stdout)
        self._provider.follow(runner.stdout, self._directory / "runner.log")
        return started

    async def tail(self, lines: int) -> str:
        text = (self._directory / "runner.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    async def end(self) -> None:
        """Ends every runner: SIGTERM first, as a platform would."""
        for runner in self.runners:
            if runner.returncode is None:
                runner.terminate()
                await runner.wait()


class MemoryProvider:
    """Sandboxes of one test."""

    name = "memory"

    def __init__(self, root: Path, *, runner: Path = RUNNER) -> None:
        self.root = root
        self.runner = runner
        self.live: dict[str, MemorySandbox] = {}
        self._store = MemorySessionStore()
        self._faults: list[str] = []
        self._followers: set[asyncio.Task[None]] = set()

    def fail_next(self, fault: str, times: int = 1) -> None:
        """Makes the next `times` calls of that kind fail."""
        if fault not in _FAULTS:
            raise ValueError(f"unknown fault {fault!r}: one of {', '.join(_FAULTS)}")
        self._faults += [fault] * times

    def disarm(self) -> None:
        """What was asked for and was not met does not happen any more."""
        self._faults.clear()

    def fault(self, *kinds: str) -> None:
        """Raises if one of `kinds` was asked for."""
        for kind in kinds:
            if kind in self._faults:
                self._faults.remove(kind)
                raise LaunchFailed(f"asked to fail at {kind}", retriable=not kind.endswith("for_good"))

    async def acquire(self, session_id: str) -> MemorySandbox:
        self.fault("acquire", "acquire_for_good")
        await asyncio.sleep(0)  # a real provider is asked over a network: let the others race
        if not await self._store.claim(session_id, "the one", _CLAIM_SECONDS):
            raise LaunchFailed("the session's sandbox is somebody else's", retriable=True)
        if sandbox := self.live.get(session_id):
            sandbox.created = False
            sandbox.last_used_at = time.time()
            return sandbox
        self.live[session_id] = MemorySandbox(self, self.root / session_id)
        return self.live[session_id]

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        if sandbox := self.live.get(sandbox_id):
            sandbox.last_used_at = time.time()

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        for session_id, sandbox in list(self.live.items()):
            yield SandboxInfo(session_id, sandbox.id, sandbox.created_at, sandbox.last_used_at, sandbox.running)

    async def release(self, sandbox_id: str) -> None:
        if sandbox := self.live.pop(sandbox_id, None):
            await sandbox.end()
            shutil.rmtree(self.root / sandbox_id)

    def follow(self, output: asyncio.StreamReader, log: Path) -> None:
        """Keeps a runner's output flowing into its log."""

        async def copy() -> None:
            with log.open("ab") as file:
                async for line in output:
                    file.write(line)
                    file.flush()

        task = asyncio.create_task(copy())
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    async def close(self) -> None:
        """Ends every runner, and whatever it left behind in its session."""
        for sandbox in self.live.values():
            for runner in sandbox.runners:
                if runner.returncode is None:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                        os.killpg(runner.pid, signal.SIGKILL)
                    await runner.wait()
        if self._followers:
            await asyncio.wait(self._followers)
