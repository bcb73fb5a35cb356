"""What requests for lists and streams of sessions, threads and events may say."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime, Field

from .params import PageQuery, Params

Status = Literal["idle", "running", "rescheduling", "terminated"]
MANY = Field(default=1000, ge=1, le=1000)


class CreatedAt(Params):
    """The four bounds of a list."""

    created_at_gt: AwareDatetime | None = Field(default=None, alias="created_at[gt]")
    created_at_gte: AwareDatetime | None = Field(default=None, alias="created_at[gte]")
    created_at_lt: AwareDatetime | None = Field(default=None, alias="created_at[lt]")
    created_at_lte: AwareDatetime | None = Field(default=None, alias="created_at[lte]")

    def admits(self, at: datetime | None) -> bool:
        """What has no moment yet is within no bound."""
        bounds = (self.created_at_gt, self.created_at_gte, self.created_at_lt, self.created_at_lte)
        if at is None:
            return all(bound is None for bound in bounds)
        return (
            (self.created_at_gt is None or at > self.created_at_gt)
            and (self.created_at_gte is None or at >= self.created_at_gte)
            and (self.created_at_lt is None or at < self.created_at_lt)
            and (self.created_at_lte is None or at <= self.created_at_lte)
        )


class SessionListQuery(PageQuery, CreatedAt):
    agent_id: str | None = None
    agent_version: int | None = None
    memory_store_id: str | None = None
    order: Literal["asc", "desc"] = "desc"
    include_archived: bool = False
    statuses: list[Status] | None = Field(default=None, alias="statuses[]")


class ResourceListQuery(Params):
    limit: int = MANY
    page: str | None = None


class ThreadListQuery(Params):
    limit: int = MANY
    page: str | None = None
    statuses: list[Status] | None = Field(default=None, alias="statuses[]")


class ThreadEventListQuery(Params):
    limit: int = MANY
    page: str | None = None


class EventListQuery(CreatedAt):
    limit: int = MANY
    page: str | None = None
    order: Literal["asc", "desc"] = "asc"
    types: list[str] | None = Field(default=None, alias="types[]")


class EventStreamQuery(Params):
    event_deltas: list[Literal["agent.message", "agent.thinking"]] | None = Field(default=None, alias="event_deltas[]")
