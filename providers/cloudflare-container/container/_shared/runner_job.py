"""The runner's contract with its host: the job it takes in, and the exit codes it gives back.

The job comes in and disappears (R11).

Sources: `--job-file` (removed once read); the SDK's own `ANTHROPIC_*` variables where they name a whole item (so that
`python sandbox_runner.py` works in anybody's container, started by anybody's poller; stdin is then not ours to read:
`ant` writes something else there, others leave it open); else stdin.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .runner_secrets import hide

EXIT_OK = 0  # done, or not needed: a healthy runner serves the session already
EXIT_BAD_JOB = 64
EXIT_CANNOT_RUN = 69
EXIT_LOCK_HELD = 73
EXIT_LEASE_LOST = 76
EXIT_HANDED_OVER = 143

DEFAULT_BASE_URL = "https://api.anthropic.com"
DEFAULT_MAX_IDLE_SECONDS = 60.0
DEFAULT_MAX_WAIT_SECONDS = 1800.0
MAX_JOB_BYTES = 256 * 1024

_NEEDED = ("ANTHROPIC_SESSION_ID", "ANTHROPIC_WORK_ID", "ANTHROPIC_ENVIRONMENT_ID")
_OWN = ("SANDBOX_MAX_IDLE_SECONDS", "SANDBOX_MAX_WAIT_SECONDS", "SANDBOX_TOOLS", "SANDBOX_TOOL_NAMES")
_SECRETS = ("ANTHROPIC_WORK_SECRET", "ANTHROPIC_ENVIRONMENT_KEY")
_HEADER = re.compile(r"[!-~]+\Z")


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
    max_wait_seconds: float = DEFAULT_MAX_WAIT_SECONDS
    tool_names: frozenset[str] = frozenset()
    """The custom tools that are ours: this host's healing answers for them."""

    @property
    def token(self) -> str:
        """The bearer for this item: the sessions token inside the secret, else the environment key."""
        return sessions_token(self.secret) or self.environment_key or ""


def read_job(job_file: Path | None, stdin: IO[bytes] | None, environ: MutableMapping[str, str]) -> RunnerJob:
    """Reads the job and removes every trace of it this process can reach: the file, and `ANTHROPIC_*` in `environ`.

    What an image sets of `SANDBOX_*` is the default of what the job says. Raises `BadJob`.
    """
    taken = {name: environ.pop(name) for name in list(environ) if name.startswith("ANTHROPIC_")}
    defaults = {name: environ.pop(name) for name in _OWN if name in environ}
    raw = b""
    if job_file is not None:
        raw = _read_and_remove(job_file)
    elif stdin is not None and not all(taken.get(name) for name in _NEEDED):
        raw = _read_to_its_end(stdin)
    values = _parsed(raw) if raw.strip() else taken
    if isinstance(values, dict):
        for name in _SECRETS:
            hide(value if isinstance(value := values.get(name), str) else None)
    return parse_job({**defaults, **values} if isinstance(values, dict) else values)


def parse_job(values: object) -> RunnerJob:
    """The job from a mapping of names to texts, as `Job.to_stdin` or the SDK's environment contract give it."""
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise BadJob("the job is not a JSON object of texts")
    if missing := [name for name in _NEEDED if not values.get(name)]:
        raise BadJob(f"the job lacks {', '.join(missing)}: send it on stdin, with --job-file, or as these variables")
    base_url = values.get("ANTHROPIC_BASE_URL") or DEFAULT_BASE_URL
    if not base_url.startswith(("https://", "http://")):
        raise BadJob("ANTHROPIC_BASE_URL does not start with https:// or http://")
    job = RunnerJob(
        session_id=values["ANTHROPIC_SESSION_ID"],
        work_id=values["ANTHROPIC_WORK_ID"],
        environment_id=values["ANTHROPIC_ENVIRONMENT_ID"],
        base_url=base_url,
        secret=values.get("ANTHROPIC_WORK_SECRET") or None,
        environment_key=values.get("ANTHROPIC_ENVIRONMENT_KEY") or None,
        max_idle_seconds=_seconds(values, "SANDBOX_MAX_IDLE_SECONDS", DEFAULT_MAX_IDLE_SECONDS),
        max_wait_seconds=_seconds(values, "SANDBOX_MAX_WAIT_SECONDS", DEFAULT_MAX_WAIT_SECONDS),
        tools=values.get("SANDBOX_TOOLS") or None,
        tool_names=frozenset(filter(None, values.get("SANDBOX_TOOL_NAMES", "").split(","))),
    )
    hide(job.token)
    if not job.token:
        raise BadJob("the job carries no usable credential: ANTHROPIC_WORK_SECRET must hold a sessions_token")
    if not _HEADER.match(job.token):  # an HTTP library would quote it in its error
        raise BadJob("the credential in ANTHROPIC_WORK_SECRET or ANTHROPIC_ENVIRONMENT_KEY fits no HTTP header")
    return job


def _seconds(values: dict[str, str], name: str, default: float) -> float:
    try:
        seconds = float(values.get(name) or default)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise BadJob(f"{name} is not a number of seconds")
    return seconds


def _parsed(raw: bytes) -> object:
    if len(raw) > MAX_JOB_BYTES:
        raise BadJob(f"the job is larger than {MAX_JOB_BYTES} bytes")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise BadJob("the job is not valid JSON") from None


def _read_to_its_end(stdin: IO[bytes]) -> bytes:
    """One JSON object, whose end need not be the end of stdin: some starters can write to it and not close it."""
    raw = b""
    while len(raw) <= MAX_JOB_BYTES and (line := stdin.readline(MAX_JOB_BYTES + 1)):
        raw += line
        if line.rstrip().endswith(b"}"):
            try:
                json.loads(raw)
            except (ValueError, RecursionError):
                continue  # of an object in it
            break
    return raw


def _read_and_remove(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            path.unlink()
            return file.read(MAX_JOB_BYTES + 1)
    except OSError as error:
        raise BadJob(f"the job file cannot be read and removed: {error.strerror}") from None


def sessions_token(secret: str | None) -> str | None:
    """The bearer inside a work item's secret: URL-safe base64 (padding optional) of JSON with `sessions_token`."""
    if not secret:
        return None
    try:
        payload = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))
    except (ValueError, RecursionError):  # binascii.Error is a ValueError
        return None
    token = payload.get("sessions_token") if isinstance(payload, dict) else None
    return token if isinstance(token, str) and token else None
