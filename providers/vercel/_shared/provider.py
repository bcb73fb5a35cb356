"""The compute seam: what a provider must offer, and nothing more.

A provider turns a session id into a sandbox that can start a runner. It never talks to the control plane, never sees
the environment key, and raises `LaunchFailed` (vendor errors are mapped to it by one table in its `sandbox.py`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from .errors import LaunchFailed
from .runner_job import EXIT_HANDED_OVER, EXIT_LEASE_LOST, EXIT_LOCK_HELD, EXIT_OK
from .runner_secrets import redact

_RETRIABLE_EXITS = frozenset({EXIT_LOCK_HELD, EXIT_HANDED_OVER})
_NOT_NEEDED_EXITS = frozenset({EXIT_OK, EXIT_LEASE_LOST})
_TEXT_LIMIT = 300  # characters of a runner's last words that go into an error


@dataclass(frozen=True)
class Launch:
    """What the dispatcher asks a sandbox to start: always the runner, told its job on stdin (R11)."""

    stdin: bytes = field(repr=False)
    """The job, as `Job.to_stdin` made it. It holds a credential: never in arguments, environment or on disk."""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Files to put into the sandbox first: path relative to the session's working directory -> content."""


@dataclass(frozen=True)
class Started:
    """How a start ended that did not fail."""

    outcome: Literal["ready", "not_needed"]
    """`ready`: the runner has its lock and the SDK loaded, and is about to ack. `not_needed`: another one serves."""


@dataclass(frozen=True)
class SandboxInfo:
    """One sandbox of ours, as the sweep sees it. Times are Unix seconds."""

    session_id: str
    sandbox_id: str
    created_at: float
    last_used_at: float
    running: bool


class Sandbox(Protocol):
    """The isolated machine of one session."""

    @property
    def id(self) -> str: ...

    @property
    def created(self) -> bool:
        """True when this `acquire` made it; False when it was found."""
        ...

    async def start(self, launch: Launch) -> Started:
        """Puts `launch.files` in place and starts the runner; returns at its ready line, or raises `LaunchFailed`."""
        ...

    async def tail(self, lines: int) -> str:
        """The last lines of the runner's log, for people."""
        ...


class Provider(Protocol):
    """Where sandboxes live."""

    @property
    def name(self) -> str: ...

    async def acquire(self, session_id: str) -> Sandbox:
        """Gets, resumes or creates the session's sandbox and proves it can exec (P4, R10). Idempotent: concurrent calls
        for one session end with one sandbox (the oldest wins, a loser's is released)."""
        ...

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        """Keeps the sandbox alive for at least `seconds` more while a runner works."""
        ...

    def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        """Every sandbox of this environment that the provider still has, running or not; nobody else's."""
        ...

    async def release(self, sandbox_id: str) -> None:
        """Ends the sandbox and deletes its files. Idempotent: an unknown id is fine."""
        ...


@runtime_checkable
class Tidies(Protocol):
    """A provider that has work of its own in each sweep, such as to stop what the platform does not stop by itself."""

    async def tidy(self) -> None:
        """Called at a sweep's end, when nobody waits for it any more, and cancelled when it takes long: what is not
        done then is the next sweep's."""
        ...


async def read_ready(lines: AsyncIterator[bytes]) -> Started:
    """Reads a runner's output up to its ready line: the one place that decides whether a start succeeded.

    The runner writes one JSON object a line (`ready`, `claimed`, `tool`, `handover`, `exit`); anything else in its
    output, such as a traceback, is kept for the error's text. Raises `LaunchFailed` when the runner ends before ready.
    """
    last_words = ""
    try:
        async for raw in lines:
            line = raw.decode("utf-8", "replace").strip()
            record = _record(line)
            if record is None:
                last_words = line or last_words
            elif record.get("event") == "ready":
                return Started("ready")
            elif record.get("event") == "exit":
                return _ended(record.get("code"), str(record.get("reason", "")))
    except ValueError:  # asyncio.StreamReader, for a line longer than its limit
        raise LaunchFailed("the runner's output is no log of a runner", retriable=True) from None
    raise LaunchFailed(
        f"the runner ended before it was ready: {redact(last_words)[-_TEXT_LIMIT:] or 'no output'}", retriable=True
    )


def _record(line: str) -> dict[str, object] | None:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _ended(code: object, reason: str) -> Started:
    code = code if isinstance(code, int) else None
    if code in _NOT_NEEDED_EXITS:
        return Started("not_needed")
    text = f"the runner exited with {code} before it was ready: {redact(reason)[:_TEXT_LIMIT] or 'no reason given'}"
    raise LaunchFailed(text, retriable=code in _RETRIABLE_EXITS)
