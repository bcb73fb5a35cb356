"""The endpoints of memory stores.

A sessions token reaches the stores of its session only, and writes to those attached for writing; the environment key
reaches none (SDK, documentation). That a refusal of either is a 403 is inferred.
"""

from __future__ import annotations

from typing import Any

from .. import replies
from ..errors import Forbidden, NotFound
from ..memory_params import (
    MOST_WITH_CONTENT,
    MemoryCreateBody,
    MemoryCreateQuery,
    MemoryDeleteQuery,
    MemoryListQuery,
    MemoryRetrieveQuery,
    MemoryStoreCreateBody,
    MemoryStoreListQuery,
    MemoryStoreUpdateBody,
    MemoryUpdateBody,
)
from ..requests import BETA, Call
from ..state.memory import Memory, MemoryStore

Json = dict[str, Any]
MEMORY_BETA = "agent-memory-2026-07-22"


async def create_store(call: Call) -> Json:
    _check_beta(call)
    call.no_query()
    body = call.body(MemoryStoreCreateBody)
    with call.engine.transact() as now:
        return replies.memory_store(call.world.memory.create(body.name, now, body.description, body.metadata))


async def list_stores(call: Call) -> Json:
    _check_beta(call)
    query = call.query(MemoryStoreListQuery)
    with call.engine.transact():
        items = [
            it
            for it in reversed(call.world.memory.all.values())
            if (query.include_archived or it.archived_at is None)
            and (query.created_at_gte is None or it.created_at >= query.created_at_gte)
            and (query.created_at_lte is None or it.created_at <= query.created_at_lte)
        ]
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.memory_store(it) for it in shown], "next_page": next_page}


async def get_store(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.memory_store(_store(call))


async def update_store(call: Call) -> Json:
    call.no_query()
    body = call.body(MemoryStoreUpdateBody)
    with call.engine.transact() as now:
        store = _store(call)
        store.update(body, now)
        return replies.memory_store(store)


async def archive_store(call: Call) -> Json:
    call.no_body()
    with call.engine.transact() as now:
        store = _store(call)
        if store.archived_at is None:
            store.archived_at = store.updated_at = now
        return replies.memory_store(store)


async def delete_store(call: Call) -> Json:
    call.no_body()
    with call.engine.transact():
        store = _store(call)
        del call.world.memory.all[store.id]
        return {"id": store.id, "type": "memory_store_deleted"}


async def create_memory(call: Call) -> Json:
    view = call.query(MemoryCreateQuery).view
    body = call.body(MemoryCreateBody)
    with call.engine.transact() as now:
        memory = _store(call, is_write=True).create(body.path, body.content or "", now)
        call.world.changes += 1
        return replies.memory(memory, view)


async def list_memories(call: Call) -> Json:
    query = call.query(MemoryListQuery)
    limit = min(query.limit, MOST_WITH_CONTENT) if query.view == "full" else query.limit
    with call.engine.transact():
        items = _store(call).listing(query.path_prefix, query.depth)
        shown, next_page = replies.page(items, _path_of, limit, query.page)
        return {"data": [replies.memory(it, query.view) for it in shown], "next_page": next_page}


async def get_memory(call: Call) -> Json:
    view = call.query(MemoryRetrieveQuery).view
    with call.engine.transact():
        return replies.memory(_store(call).memory(call.path["memory_id"]), view)


async def update_memory(call: Call) -> Json:
    view = call.query(MemoryCreateQuery).view
    body = call.body(MemoryUpdateBody)
    expected = body.precondition.content_sha256 if body.precondition else None
    with call.engine.transact() as now:
        store = _store(call, is_write=True)
        memory = store.change(call.path["memory_id"], now, body.content, body.path, expected)
        call.world.changes += 1
        return replies.memory(memory, view)


async def delete_memory(call: Call) -> Json:
    call.no_body()
    expected = call.query(MemoryDeleteQuery).expected_content_sha256
    with call.engine.transact():
        _store(call, is_write=True).delete(call.path["memory_id"], expected)
        call.world.changes += 1
        return {"id": call.path["memory_id"], "type": "memory_deleted"}


def _store(call: Call, *, is_write: bool = False) -> MemoryStore:
    """The store of the path, if the credential may have it."""
    _check_beta(call)
    store_id = call.path["memory_store_id"]
    if call.credential.session_id is not None:
        session = call.world.session(call.credential.session_id)
        access = next((it["access"] for it in session.resources if it["memory_store_id"] == store_id), None)
        if access is None:
            raise Forbidden(f"memory store {store_id} is not attached to session {session.id}")
        if is_write and access == "read_only":
            raise Forbidden(f"memory store {store_id} is attached to session {session.id} as read_only")
    return call.world.memory.get(store_id)


def _path_of(item: Memory | str) -> str:
    return item if isinstance(item, str) else item.path


def _check_beta(call: Call) -> None:
    if not {MEMORY_BETA, BETA} & call.betas:
        raise NotFound(f"memory stores need the header anthropic-beta: {MEMORY_BETA} or {BETA}")
