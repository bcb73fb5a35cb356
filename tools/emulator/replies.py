"""Wire shapes: what the control plane answers, with every field the SDK's types know, null when unset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from .clock import stamp
from .errors import Invalid
from .state import Session, WorkItem
from .state.catalog import Agent, Environment
from .state.memory import Memory, MemoryStore
from .state.skills import Skill, SkillVersion
from .state.threads import Thread

Json = dict[str, Any]
T = TypeVar("T")


def optional_stamp(moment: datetime | None) -> str | None:
    return stamp(moment) if moment else None


def work(item: WorkItem, secret: str | None = None) -> Json:
    """`actor` is undocumented but in every recording; `secret` is set in poll responses only."""
    return {
        "id": item.id,
        "type": "work",
        "environment_id": item.environment_id,
        "data": {"type": item.kind, "id": item.session_id},
        "state": item.state,
        "metadata": dict(item.metadata),
        "secret": secret,
        "actor": None,
        "created_at": stamp(item.created_at),
        "acknowledged_at": optional_stamp(item.acknowledged_at),
        "started_at": optional_stamp(item.started_at),
        "latest_heartbeat_at": optional_stamp(item.latest_heartbeat_at),
        "stop_requested_at": optional_stamp(item.stop_requested_at),
        "stopped_at": optional_stamp(item.stopped_at),
    }


def heartbeat(item: WorkItem, *, is_extended: bool) -> Json:
    return {
        "type": "work_heartbeat",
        "last_heartbeat": item.last_heartbeat or "",
        "lease_extended": is_extended,
        "state": item.state,
        "ttl_seconds": int(item.ttl.total_seconds()),
    }


def environment(it: Environment) -> Json:
    return {
        "id": it.id,
        "type": "environment",
        "name": it.name,
        "description": it.description,
        "config": {"type": "self_hosted"},
        "metadata": dict(it.metadata),
        "scope": "organization",
        "created_at": stamp(it.created_at),
        "updated_at": stamp(it.updated_at),
        "archived_at": optional_stamp(it.archived_at),
    }


def agent(it: Agent) -> Json:
    created_at = stamp(it.created_at)
    own = {"metadata": dict(it.metadata), "created_at": created_at, "updated_at": created_at, "archived_at": None}
    return it.snapshot() | own


def session(it: Session, now: datetime) -> Json:
    return {
        "id": it.id,
        "type": "session",
        "status": it.status,
        "environment_id": it.environment_id,
        "agent": it.agent,
        "title": it.title,
        "metadata": dict(it.metadata),
        "resources": it.resources,
        "vault_ids": it.vault_ids,
        "outcome_evaluations": [],
        "budget": None,
        "deployment_id": None,
        "stats": {
            "active_seconds": it.meter.seconds(now),
            "duration_seconds": (now - it.created_at).total_seconds(),
        },
        "usage": it.meter.usage(),
        "created_at": stamp(it.created_at),
        "updated_at": stamp(it.updated_at),
        "archived_at": optional_stamp(it.archived_at),
    }


def thread(session: Session, it: Thread | None, now: datetime) -> Json:
    """A sub-agent's thread, or (None) the primary one."""
    meter = it.meter if it else session.meter
    created_at, updated_at = (it.created_at, it.updated_at) if it else (session.created_at, session.updated_at)
    end = it.archived_at if it and it.archived_at else now
    return {
        "id": it.id if it else session.thread_id,
        "type": "session_thread",
        "session_id": session.id,
        "parent_thread_id": session.thread_id if it else None,
        "workflow_run_id": None,
        "agent": {**session.agent, "name": it.agent_name} if it else session.agent,
        "status": it.status if it else session.status,
        "stats": {
            "active_seconds": meter.seconds(now),
            "duration_seconds": (end - created_at).total_seconds(),
            "startup_seconds": 0.0,
        },
        "usage": meter.usage(),
        "created_at": stamp(created_at),
        "updated_at": stamp(updated_at),
        "archived_at": optional_stamp(it.archived_at if it else session.archived_at),
    }


def skill(it: Skill) -> Json:
    return {
        "id": it.id,
        "type": "skill",
        "display_name": it.display_name,
        "latest_version_id": it.latest.id,
        "source": {"type": "custom"},
        "created_at": stamp(it.created_at),
        "updated_at": stamp(it.latest.created_at),
    }


def skill_version(it: SkillVersion, *, by_epoch: bool) -> Json:
    """`by_epoch`: as the clients of the older beta read it, with the version's number and directory (older SDKs)."""
    older = {"version": it.epoch, "directory": it.name} if by_epoch else {}
    return {
        "id": it.id,
        "type": "skill_version",
        "skill_id": it.skill_id,
        "name": it.name,
        "description": it.description,
        "created_at": stamp(it.created_at),
        **older,
    }


def memory_store(it: MemoryStore) -> Json:
    return {
        "id": it.id,
        "type": "memory_store",
        "name": it.name,
        "description": it.description,
        "metadata": dict(it.metadata),
        "created_at": stamp(it.created_at),
        "updated_at": stamp(it.updated_at),
        "archived_at": optional_stamp(it.archived_at),
    }


def memory(it: Memory | str, view: str) -> Json:
    """A memory, or the prefix that stands for those below it."""
    if isinstance(it, str):
        return {"type": "memory_prefix", "path": it}
    return {
        "id": it.id,
        "type": "memory",
        "memory_store_id": it.store_id,
        "memory_version_id": it.version_id,
        "path": it.path,
        "content": it.content if view == "full" else None,
        "content_sha256": it.sha256,
        "content_size_bytes": it.size,
        "created_at": stamp(it.created_at),
        "updated_at": stamp(it.updated_at),
    }


def page(items: Sequence[T], id_of: Callable[[T], str], limit: int, after: str | None) -> tuple[list[T], str | None]:
    """One page and the cursor of the next. The cursor is the last id shown, so items that arrive move nothing."""
    start = 0
    if after is not None:
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise Invalid("page: not a cursor of this list")
        start = ids.index(after) + 1
    shown = list(items[start : start + limit])
    is_last = start + limit >= len(items)
    return shown, None if is_last else id_of(shown[-1])
