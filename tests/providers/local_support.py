"""What the tests of the local provider share: a provider with a stand-in runner, and what this machine shows of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.folders import load_folder

LOCAL = load_folder("local")
RUNNER = Path(__file__).with_name("local_runner.py")
PATIENCE_SECONDS = 60.0
PROBLEM = LOCAL.module("bubblewrap").problem(sys.executable)

# On CI nothing may be skipped: there the tests run, and fail with the reason.
needs_bubblewrap = pytest.mark.skipif(PROBLEM is not None and not os.environ.get("CI"), reason=str(PROBLEM))
both = pytest.mark.parametrize("isolation", [pytest.param("bubblewrap", marks=needs_bubblewrap), "none"])


class Sandboxes:
    """A provider below one root, and runs in its sandboxes."""

    def __init__(self, root: Path, runner_directory: Path, **options: Any) -> None:
        self.root = root
        runner_directory.mkdir(exist_ok=True)  # of its own: the runner's directory can be read in the sandbox
        self.runner = runner_directory / RUNNER.name
        self.runner.write_bytes(RUNNER.read_bytes())
        self.provider = LOCAL.sandbox.LocalProvider(root, **{"runner": self.runner, "grace_seconds": 5.0, **options})

    async def begin(self, session_id: str, *commands: str, files: dict[str, bytes] | None = None, **job: Any) -> Any:
        """Starts a runner and returns its sandbox and the run's id."""
        sandbox = await self.provider.acquire(session_id)
        run = uuid.uuid4().hex
        started = await sandbox.start(self.launch({"run": run, "commands": commands, **job}, files))
        assert started.outcome == "ready"
        return sandbox, run

    async def run(self, session_id: str, *commands: str, **job: Any) -> list[str]:
        """What `commands` print in the session's sandbox."""
        sandbox, run = await self.begin(session_id, *commands, **job)
        log = self.root / session_id / "runner.log"
        await until(lambda: f'"run": "{run}"' in log.read_text().rpartition("\n")[0])
        (done,) = [line for line in (await sandbox.tail(10_000)).splitlines() if f'"run": "{run}"' in line]
        out: list[str] = json.loads(done)["out"]
        return out

    def launch(self, job: Any, files: dict[str, bytes] | None = None) -> Any:
        stdin = job if isinstance(job, bytes) else json.dumps(job).encode()
        return LOCAL.shared("provider").Launch(stdin=stdin, files=files or {})

    async def infos(self) -> list[Any]:
        return [info async for info in self.provider.sandboxes()]


async def until(true: Callable[[], Any]) -> None:
    """Waits for a condition on real state; fails when it does not come true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)


def processes(marker: str) -> list[int]:
    """The processes of this machine, sandboxes included, with `marker` in their command line."""
    return [pid for pid, text in read_all("cmdline").items() if marker.encode() in text]


def read_all(name: str) -> dict[int, bytes]:
    """/proc/<pid>/`name` of every process this user may look at, without ourselves."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found[int(entry.name)] = (entry / name).read_bytes()
            except OSError:
                continue  # gone, or not ours to read
    return found
