"""The endpoints of events: send, the history by pages, and the live stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from starlette.responses import Response, StreamingResponse

from tools.emulator import replies
from tools.emulator.engine import Engine, wait_event
from tools.emulator.params import EventListQuery, EventsBody, EventStreamQuery
from tools.emulator.requests import Call
from tools.emulator.state import Event, Session

KEEP_ALIVE_SECONDS = 15.0
_PING = 'event: ping\ndata: {"type": "ping"}\n\n'


async def send_events(call: Call) -> dict[str, Any]:
    call.no_query()
    inbound = call.body(EventsBody).events
    call.credentials.check_events(call.credential, {event.type for event in inbound})
    with call.engine.transact() as now:
        return {"data": call.world.send(call.path["session_id"], inbound, now)}


async def list_events(call: Call) -> dict[str, Any]:
    query = call.query(EventListQuery)
    with call.engine.transact():
        events = [event for event in call.world.session(call.path["session_id"]).events() if _matches(event, query)]
    events = events if query.order == "asc" else events[::-1]
    shown, next_page = replies.page(events, lambda event: str(event["id"]), query.limit, query.page)
    return {"data": shown, "next_page": next_page}


def _matches(event: Event, query: EventListQuery) -> bool:
    """The `created_at` filters compare `processed_at` (SDK); a message that still waits matches none of them."""
    if query.types is not None and event["type"] not in query.types:
        return False
    bounds = (query.created_at_gt, query.created_at_gte, query.created_at_lt, query.created_at_lte)
    if all(bound is None for bound in bounds):
        return True
    if event["processed_at"] is None:
        return False
    at = datetime.fromisoformat(event["processed_at"])
    return (
        (query.created_at_gt is None or at > query.created_at_gt)
        and (query.created_at_gte is None or at >= query.created_at_gte)
        and (query.created_at_lt is None or at < query.created_at_lt)
        and (query.created_at_lte is None or at <= query.created_at_lte)
    )


async def stream_events(call: Call) -> Response:
    """Live events only, no replay (documented): a client opens the stream, lists the history and dedupes by id.

    The stream starts here and not at the first byte read, so nothing falls between its opening and that list. Delta
    previews may be asked for; they are best effort and this emulator sends none.
    """
    call.query(EventStreamQuery)
    with call.engine.transact():
        session = call.world.session(call.path["session_id"])
        start = len(session.broadcast)
    headers = {"cache-control": "no-cache"}
    return StreamingResponse(_frames(call.engine, session, start), media_type="text/event-stream", headers=headers)


async def _frames(engine: Engine, session: Session, sent: int) -> AsyncIterator[str]:
    with engine.listen() as changed:
        while not engine.is_closing:
            changed.clear()
            with engine.transact():
                fresh = session.broadcast[sent:]
            sent += len(fresh)
            for event in fresh:
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
                if event["type"] == "session.deleted":
                    return
            if not await wait_event(changed, KEEP_ALIVE_SECONDS):
                yield _PING
