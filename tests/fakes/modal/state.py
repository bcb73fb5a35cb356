"""What the double remembers: the objects of one workspace."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_proto import api_pb2 as api

from .machine import Machine, Process

_numbers = itertools.count(1)


def new_id(prefix: str, suffix: str = "", length: int = 22) -> str:
    """An id of the form Modal's client expects."""
    return f"{prefix}-{next(_numbers):0{length - len(suffix)}d}{suffix}"


def token(seconds: float = 3600.0) -> str:
    """A JWT that Modal's client can read the expiry of. Signed by nobody."""

    def part(values: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part({'exp': time.time() + seconds, 'n': next(_numbers)})}.unsigned"


@dataclass
class Image:
    """A built image: what was copied into it, below `root`, and the commands of its build."""

    id: str
    root: Path
    commands: list[str]
    error: str = ""


@dataclass
class Volume:
    id: str
    name: str
    root: Path
    version: int


@dataclass
class Sandbox:
    """A sandbox, running or ended."""

    id: str
    task_id: str
    app_id: str
    definition: api.Sandbox
    tags: dict[str, str]
    machine: Machine
    environment: dict[str, str]
    version: int
    """2, or 1 for one made through the older calls."""
    created_at: float = field(default_factory=time.time)
    entry: Process | None = None
    result: api.GenericResult | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    executions: dict[str, Process] = field(default_factory=dict)
    active_at: float = field(default_factory=time.monotonic)
    """When a command last ran in it."""
    access_tokens: list[str] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.result is None

    def is_idle(self) -> bool:
        return all(process.code is not None for process in self.executions.values())


@dataclass
class State:
    """One workspace."""

    directory: Path
    apps: dict[str, str] = field(default_factory=dict)
    """Deployed or looked up: name -> id."""
    published: dict[str, api.AppPublishRequest] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    secret_ids: dict[str, str] = field(default_factory=dict)
    proxies: dict[str, str] = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)
    """By id."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Uploaded contents, by hash."""
    mounts: dict[str, list[api.MountFile]] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)
    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    functions: dict[str, api.Function] = field(default_factory=dict)

    def environment(self, secret_ids: Any, sources: Any) -> dict[str, str]:
        """The variables that some secrets are."""
        variables: dict[str, str] = {}
        for secret_id in secret_ids:
            variables |= self.secrets[secret_id]
        for source in sources:
            kind = source.WhichOneof("source")
            variables |= self.secrets[source.secret_id] if kind == "secret_id" else dict(source.env.contents)
        return variables
