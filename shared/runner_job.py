"""The runner's contract with its host: the job it takes in, and the exit codes it gives back.

The job comes in and disappears (R11).

Sources, first one that has it: `--job-file` (removed once read), stdin, the SDK's own `ANTHROPIC_*` variables (so that
`python sandbox_runner.py` works in anybody's container, started by anybody's poller).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

EXIT_OK = 0  # done, or not needed: a healthy runner serves the session already
EXIT_BAD_JOB = 64
EXIT_CANNOT_RUN = 69
EXIT_LOCK_HELD = 73
EXIT_LEASE_LOST = 76
EXIT_HANDED_OVER = 143

DEFAULT_BASE_URL = "https://api.anthropic.com"
DEFAULT_MAX_IDLE_SECONDS = 60.0
MAX_JOB_BYTES = 256 * 1024


class BadJob(Exception):
    """The job is missing something or cannot be read. The text never quotes a value."""


@dataclass(frozen=True)
class RunnerJob:
    """One session to serve."""

    session_id: str
    work_id: str
    environment_id: str
    base_url: str
    secret: str | None = field(repr=False)
    environment_key: str | None = field(repr=False)
    max_idle_seconds: float
    tools: str | None

    @property
    def token(self) -> str:
        """The bearer for this item: the sessions token inside the secret, else the environment key."""
        return sessions_token(self.secret) or self.environment_key or ""


def read_job(job_file: Path | None, stdin: IO[bytes] | None, environ: MutableMapping[str, str]) -> RunnerJob:
    """Reads the job and removes every trace of it this process can reach: the file, and `ANTHROPIC_*` in `environ`.

    Raises `BadJob`.
    """
    taken = {name: environ.pop(name) for name in list(environ) if name.startswith("ANTHROPIC_")}
    for name in ("SANDBOX_MAX_IDLE_SECONDS", "SANDBOX_TOOLS"):
        if name in environ:
            taken[name] = environ.pop(name)
    if job_file is not None:
        raw = _read_and_remove(job_file)
    elif stdin is not None:
        raw = stdin.read(MAX_JOB_BYTES + 1)
    else:
        raw = b""
    return parse_job(json.loads(_checked(raw))) if raw.strip() else parse_job(dict(taken))


def parse_job(values: object) -> RunnerJob:
    """The job from a mapping of names to texts, as `Job.to_stdin` or the SDK's environment contract give it."""
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise BadJob("the job is not a JSON object of texts")
    needed = ("ANTHROPIC_SESSION_ID", "ANTHROPIC_WORK_ID", "ANTHROPIC_ENVIRONMENT_ID")
    if missing := [name for name in needed if not values.get(name)]:
        raise BadJob(f"the job lacks {', '.join(missing)}: send it on stdin, with --job-file, or as these variables")
    try:
        max_idle = float(values.get("SANDBOX_MAX_IDLE_SECONDS") or DEFAULT_MAX_IDLE_SECONDS)
    except ValueError:
        raise BadJob("SANDBOX_MAX_IDLE_SECONDS is not a number of seconds") from None
    job = RunnerJob(
        session_id=values["ANTHROPIC_SESSION_ID"],
        work_id=values["ANTHROPIC_WORK_ID"],
        environment_id=values["ANTHROPIC_ENVIRONMENT_ID"],
        base_url=values.get("ANTHROPIC_BASE_URL") or DEFAULT_BASE_URL,
        secret=values.get("ANTHROPIC_WORK_SECRET") or None,
        environment_key=values.get("ANTHROPIC_ENVIRONMENT_KEY") or None,
        max_idle_seconds=max_idle,
        tools=values.get("SANDBOX_TOOLS") or None,
    )
    if not job.token:
        raise BadJob("the job carries no usable credential: ANTHROPIC_WORK_SECRET must hold a sessions_token")
    return job


def _checked(raw: bytes) -> bytes:
    if len(raw) > MAX_JOB_BYTES:
        raise BadJob(f"the job is larger than {MAX_JOB_BYTES} bytes")
    try:
        json.loads(raw)
    except ValueError:
        raise BadJob("the job is not valid JSON") from None
    return raw


def _read_and_remove(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise BadJob(f"the job file cannot be read: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        path.unlink()
        return file.read(MAX_JOB_BYTES + 1)


def sessions_token(secret: str | None) -> str | None:
    """The bearer inside a work item's secret: URL-safe base64 (padding optional) of JSON with `sessions_token`."""
    if not secret:
        return None
    try:
        payload = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))
    except (ValueError, binascii.Error):
        return None
    token = payload.get("sessions_token") if isinstance(payload, dict) else None
    return token if isinstance(token, str) and token else None
