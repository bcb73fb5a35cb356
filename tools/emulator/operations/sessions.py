"""The endpoints of sessions."""

from __future__ import annotations

from typing import Any

from .. import replies
from ..errors import Invalid
from ..list_params import ResourceListQuery, SessionListQuery
from ..params import SessionCreateBody, SessionUpdateBody
from ..requests import Call
from ..state import Session

Json = dict[str, Any]


async def create_session(call: Call) -> Json:
    body = call.body(SessionCreateBody)
    with call.engine.transact() as now:
        return replies.session(call.world.create_session(body, now), now)


async def list_sessions(call: Call) -> Json:
    query = call.query(SessionListQuery)
    with call.engine.transact() as now:
        items = [it for it in call.world.sessions.values() if _matches(it, query)]
        items = items if query.order == "asc" else items[::-1]
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.session(it, now) for it in shown], "next_page": next_page}


def _matches(it: Session, query: SessionListQuery) -> bool:
    """An agent has one version here, and a version without its agent says nothing (SDK)."""
    is_version = query.agent_id is None or query.agent_version in (None, it.agent["version"])
    return (
        (query.include_archived or it.archived_at is None)
        and (query.statuses is None or it.status in query.statuses)
        and query.agent_id in (None, it.agent["id"])
        and is_version
        and query.memory_store_id in (None, *(resource["memory_store_id"] for resource in it.resources))
        and query.admits(it.created_at)
    )


async def get_session(call: Call) -> Json:
    call.no_query()
    with call.engine.transact() as now:
        return replies.session(call.world.session(call.path["session_id"]), now)


async def update_session(call: Call) -> Json:
    body = call.body(SessionUpdateBody)
    with call.engine.transact() as now:
        return replies.session(call.world.update_session(call.path["session_id"], body, now), now)


async def archive_session(call: Call) -> Json:
    call.no_body()
    with call.engine.transact() as now:
        return replies.session(call.world.archive_session(call.path["session_id"], now), now)


async def delete_session(call: Call) -> Json:
    call.no_body()
    with call.engine.transact() as now:
        call.world.delete_session(call.path["session_id"], now)
        return {"id": call.path["session_id"], "type": "session_deleted"}


async def list_resources(call: Call) -> Json:
    query = call.query(ResourceListQuery)
    with call.engine.transact():
        items = call.world.session(call.path["session_id"]).resources
        shown, next_page = replies.page(items, lambda it: str(it["memory_store_id"]), query.limit, query.page)
        return {"data": shown, "next_page": next_page}


async def add_resource(call: Call) -> Json:
    """Only files can be added to a session, and only to one that is not self-hosted (SDK, documentation)."""
    with call.engine.transact():
        session = call.world.session(call.path["session_id"])
    raise Invalid(f"environment {session.environment_id} is self_hosted: resources are not supported")
