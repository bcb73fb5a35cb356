"""The endpoints of a session's threads: the primary one and those of its sub-agents."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from .. import replies
from ..list_params import EventStreamQuery, ThreadEventListQuery, ThreadListQuery
from ..requests import Call
from ..state import Session
from ..state.threads import Thread
from ..streams import stream

Json = dict[str, Any]


async def list_threads(call: Call) -> Json:
    query = call.query(ThreadListQuery)
    with call.engine.transact() as now:
        session = call.world.session(call.path["session_id"])
        items = [replies.thread(session, thread, now) for thread in (None, *session.threads.values())]
    items = [item for item in items if query.statuses is None or item["status"] in query.statuses]
    shown, next_page = replies.page(items, lambda item: str(item["id"]), query.limit, query.page)
    return {"data": shown, "next_page": next_page}


async def get_thread(call: Call) -> Json:
    call.no_query()
    with call.engine.transact() as now:
        session, thread = _thread(call)
        return replies.thread(session, thread, now)


async def archive_thread(call: Call) -> Json:
    call.no_body()
    with call.engine.transact() as now:
        call.world.archive_thread(call.path["session_id"], call.path["thread_id"], now)
        session, thread = _thread(call)
        return replies.thread(session, thread, now)


async def list_events(call: Call) -> Json:
    query = call.query(ThreadEventListQuery)
    with call.engine.transact():
        session, thread = _thread(call)
        events = list(thread.log) if thread else session.events()
    shown, next_page = replies.page(events, lambda event: str(event["id"]), query.limit, query.page)
    return {"data": shown, "next_page": next_page}


async def stream_events(call: Call) -> Response:
    call.query(EventStreamQuery)
    with call.engine.transact():
        session, thread = _thread(call)
        return stream(call.engine, session.id, thread.log if thread else session.broadcast)


def _thread(call: Call) -> tuple[Session, Thread | None]:
    """The thread the path names; None is the primary one."""
    session = call.world.session(call.path["session_id"])
    thread_id = call.path["thread_id"]
    return session, None if thread_id == session.thread_id else session.thread(thread_id)
