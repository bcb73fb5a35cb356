"""What the double remembers: sandboxes, their sessions (one boot each), commands and snapshots."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import CWD, Machine

REGION = "iad1"
LAST_WORDS_SECONDS = 0.5
_numbers = itertools.count(1)


def now_ms() -> int:
    return int(time.time() * 1000)


def new_id(prefix: str) -> str:
    return f"{prefix}_{next(_numbers):020d}"


class Refused(Exception):
    """An error in the API's form."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status = status
        self.code = code


@dataclass
class Snapshot:
    id: str
    disk: Path
    source_session_id: str
    created_at: int = field(default_factory=now_ms)
    expires_at: int | None = None
    status: str = "created"

    def shown(self) -> dict[str, Any]:
        times = {"createdAt": self.created_at, "updatedAt": self.created_at, "expiresAt": self.expires_at}
        identity = {"id": self.id, "sourceSessionId": self.source_session_id, "region": REGION, "sizeBytes": 1}
        return {**identity, "status": self.status, **{name: at for name, at in times.items() if at is not None}}


@dataclass
class Command:
    """A process, its output so far, and who waits for more."""

    id: str
    name: str
    args: list[str]
    cwd: str
    session_id: str
    process: asyncio.subprocess.Process
    has_stdin: bool
    started_at: int = field(default_factory=now_ms)
    exit_code: int | None = None
    output: list[dict[str, str]] = field(default_factory=list)
    stdin_bytes: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def shown(self) -> dict[str, Any]:
        identity = {"id": self.id, "name": self.name, "args": self.args, "cwd": self.cwd, "sessionId": self.session_id}
        return {**identity, "exitCode": self.exit_code, "startedAt": self.started_at}

    async def follow(self) -> None:
        """Collects the output until the process and everyone who holds its output are gone."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        async with asyncio.TaskGroup() as pumps:
            out = pumps.create_task(self._pump("stdout", self.process.stdout))
            err = pumps.create_task(self._pump("stderr", self.process.stderr))
            code = await self.process.wait()
            # Its own last words come before its end; what a child of its holds open is not waited for.
            await asyncio.wait([out, err], timeout=LAST_WORDS_SECONDS)
            async with self.changed:
                self.exit_code = code if code >= 0 else 128 - code
                self.changed.notify_all()

    async def _pump(self, name: str, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(1 << 16):
            async with self.changed:
                self.output.append({"stream": name, "data": chunk.decode(errors="replace")})
                self.changed.notify_all()


@dataclass
class Session:
    """One boot of a sandbox."""

    id: str
    sandbox: Sandbox
    machine: Machine
    timeout_ms: int
    network_policy: dict[str, Any] | None
    status: str = "running"
    started_at: int = field(default_factory=now_ms)
    stopped_at: int | None = None
    commands: dict[str, Command] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def left_ms(self) -> int:
        return self.started_at + self.timeout_ms - now_ms()

    def shown(self) -> dict[str, Any]:
        sandbox = self.sandbox
        shown: dict[str, Any] = {
            "id": self.id,
            "sourceSandboxName": sandbox.name,
            "projectId": sandbox.project_id,
            "cwd": CWD,
        }
        shown |= {"status": self.status, "region": REGION, "memory": sandbox.memory, "vcpus": sandbox.vcpus}
        shown |= {"timeout": self.timeout_ms, "requestedAt": self.started_at, "startedAt": self.started_at}
        shown |= {"networkPolicy": read_back(self.network_policy)} if self.network_policy else {}
        return shown | ({"stoppedAt": self.stopped_at} if self.stopped_at else {})

    def end(self) -> None:
        """Switches the machine off. The disk of a persistent sandbox becomes its current snapshot."""
        if self.status == "stopped":
            return
        self.status, self.stopped_at = "stopped", now_ms()
        self.sandbox.status_updated_at = now_ms()
        for command in self.commands.values():
            self.machine.leave(command.process)
        self.machine.stop()
        self.sandbox.snapshot_id = new_id("snap")


@dataclass
class Sandbox:
    name: str
    project_id: str
    disk: Path
    tags: dict[str, str]
    timeout_ms: int
    network_policy: dict[str, Any] | None
    memory: int
    vcpus: int
    image: str | None
    env: dict[str, str]
    created_at: int = field(default_factory=now_ms)
    status_updated_at: int = field(default_factory=now_ms)
    session: Session | None = None
    snapshot_id: str | None = None
    snapshot_is_gone: bool = False

    @property
    def current(self) -> Session:
        assert self.session is not None
        return self.session

    def shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"name": self.name, "currentSessionId": self.current.id, "projectId": self.project_id}
        shown |= {"status": self.current.status, "persistent": True, "region": REGION, "cwd": CWD, "tags": self.tags}
        shown |= {"memory": self.memory, "vcpus": self.vcpus, "timeout": self.timeout_ms, "image": self.image}
        shown |= {"currentSnapshotId": self.snapshot_id, "statusUpdatedAt": self.status_updated_at}
        shown |= {"networkPolicy": read_back(self.network_policy) if self.network_policy else None}
        shown |= {"createdAt": self.created_at, "updatedAt": self.status_updated_at}
        return {name: value for name, value in shown.items() if value is not None}


def read_back(policy: dict[str, Any]) -> dict[str, Any]:
    """A policy as the API shows it: header values are left out."""
    if "mode" in policy:
        return {"mode": policy["mode"]}
    shown: dict[str, Any] = {"mode": "custom", "allowedDomains": list(policy["allow"])}
    rules = [
        {"domain": domain, "headerNames": sorted(transform.get("headers", {})), "matchDimensions": list(rule["match"])}
        for domain, rules in policy["allow"].items()
        for rule in rules
        for transform in rule.get("transform", [])
    ]
    return shown | ({"injectionRules": rules} if rules else {})
