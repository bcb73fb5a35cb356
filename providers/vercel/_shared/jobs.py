"""The job: what a runner is told. `Job.to_stdin` is the whole contract between the host and `sandbox_runner.py`."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from typing import Protocol

from .errors import JobRefused
from .runner_job import sessions_token
from .settings import Settings

# Ids become names of sandboxes, files and labels at the providers; whatever else arrives is refused, not escaped.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")


class _Data(Protocol):
    @property
    def id(self) -> str: ...


class WorkItem(Protocol):
    """The part of the SDK's work item that a job is made of."""

    @property
    def id(self) -> str: ...
    @property
    def environment_id(self) -> str: ...
    @property
    def secret(self) -> str | None: ...
    @property
    def data(self) -> _Data: ...


@dataclass(frozen=True)
class Job:
    """One work item, as the runner needs it."""

    session_id: str
    work_id: str
    environment_id: str
    base_url: str
    secret: str | None = field(repr=False)
    environment_key: str | None = field(repr=False)
    max_idle_seconds: float
    tools: str | None
    max_wait_seconds: float
    tool_names: tuple[str, ...] = ()

    @classmethod
    def from_item(cls, item: WorkItem, settings: Settings) -> Job:
        """Raises `JobRefused` for an item that is not ours, has an unusable id, or carries no usable secret (P5)."""
        for name, value in (("work", item.id), ("session", item.data.id)):
            if not isinstance(value, str) or not _ID.match(value):
                raise JobRefused(f"the item's {name} id is malformed")
        if item.environment_id != settings.environment_id:
            raise JobRefused("the item belongs to another environment")
        token = sessions_token(item.secret)
        if token is None and not settings.allow_environment_key_in_sandbox:
            raise JobRefused(
                "the item carries no usable secret: ask Anthropic to enable per-session secrets, or set"
                " ALLOW_ENVIRONMENT_KEY_IN_SANDBOX=true and accept that the agent can read the environment key"
            )
        return cls(
            session_id=item.data.id,
            work_id=item.id,
            environment_id=item.environment_id,
            base_url=settings.base_url,
            secret=_minimal_secret(token) if token else None,
            environment_key=None if token else settings.environment_key,
            max_idle_seconds=settings.max_idle_seconds,
            tools=settings.tools,
            max_wait_seconds=settings.max_wait_seconds,
            tool_names=settings.tool_names,
        )

    def to_stdin(self) -> bytes:
        """The job as the runner reads it: one JSON object, the SDK's own names for what the SDK's worker also reads."""
        values = {
            "ANTHROPIC_SESSION_ID": self.session_id,
            "ANTHROPIC_WORK_ID": self.work_id,
            "ANTHROPIC_ENVIRONMENT_ID": self.environment_id,
            "ANTHROPIC_BASE_URL": self.base_url,
            "ANTHROPIC_WORK_SECRET": self.secret,
            "ANTHROPIC_ENVIRONMENT_KEY": self.environment_key,
            "SANDBOX_MAX_IDLE_SECONDS": f"{self.max_idle_seconds:g}",
            "SANDBOX_MAX_WAIT_SECONDS": f"{self.max_wait_seconds:g}",
            "SANDBOX_TOOLS": self.tools,
            "SANDBOX_TOOL_NAMES": ",".join(self.tool_names) or None,
        }
        return json.dumps({name: value for name, value in values.items() if value is not None}).encode()


def _minimal_secret(token: str) -> str:
    """The secret again with nothing but the token: the rest of the bundle is not the sandbox's business."""
    return base64.urlsafe_b64encode(json.dumps({"sessions_token": token}).encode()).decode().rstrip("=")
