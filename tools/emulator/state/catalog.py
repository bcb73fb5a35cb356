"""Environments and agents: what a session refers to. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..errors import Invalid
from ..params import AgentCreateBody, EnvironmentUpdateBody
from .ids import new_id
from .work import WorkQueue, merge

_TOOLSET = "agent_toolset_20260401"
_ALWAYS_ALLOW = {"enabled": True, "permission_policy": {"type": "always_allow"}}


@dataclass
class Environment:
    id: str
    name: str
    created_at: datetime
    updated_at: datetime
    queue: WorkQueue
    description: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    archived_at: datetime | None = None

    def update(self, body: EnvironmentUpdateBody, now: datetime) -> None:
        if self.archived_at is not None:
            raise Invalid(f"environment {self.id} is archived", {"error_code": "environment_archived"})
        self.name = body.name or self.name
        if "description" in body.model_fields_set:
            self.description = body.description
        merge(self.metadata, body.metadata)
        self.updated_at = now

    def archive(self, now: datetime) -> None:
        self.archived_at = self.archived_at or now


@dataclass
class Agent:
    """One version only: the emulator has no agent updates."""

    id: str
    created_at: datetime
    name: str
    model: dict[str, Any]
    description: str | None
    system: str | None
    tools: list[dict[str, Any]]
    skills: list[dict[str, Any]]
    mcp_servers: list[dict[str, Any]]
    metadata: dict[str, str]

    @classmethod
    def create(cls, body: AgentCreateBody, now: datetime) -> Agent:
        model = {"id": body.model, "speed": "standard"} if isinstance(body.model, str) else body.model.model_dump()
        skills = [skill.model_dump() | {"version": skill.version or "latest"} for skill in body.skills]
        return cls(
            new_id("agent"),
            now,
            body.name,
            model,
            body.description,
            body.system,
            [_resolved_tool(tool) for tool in body.tools],
            skills,
            body.mcp_servers,
            dict(body.metadata),
        )

    def snapshot(self) -> dict[str, Any]:
        """The agent as a session keeps it."""
        return {
            "id": self.id,
            "type": "agent",
            "name": self.name,
            "version": 1,
            "description": self.description,
            "system": self.system,
            "model": self.model,
            "tools": self.tools,
            "skills": self.skills,
            "mcp_servers": self.mcp_servers,
            "multiagent": None,
            "execution_identity": {"type": "service_account"},
        }


def _resolved_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A toolset is returned with its defaults filled in; the scripted agent does not consult them."""
    if tool.get("type") == _TOOLSET:
        return {"type": _TOOLSET, "configs": tool.get("configs", []), "default_config": _default_config(tool)}
    if tool.get("type") == "custom":
        return tool
    raise Invalid(f"tools: {tool.get('type')!r} is not a kind of tool this emulator models")


def _default_config(tool: dict[str, Any]) -> dict[str, Any]:
    return {**_ALWAYS_ALLOW, **(tool.get("default_config") or {})}
