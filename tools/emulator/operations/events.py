"""The endpoints of events: send, the history by pages, and the live stream."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from starlette.responses import Response

from .. import replies
from ..list_params import EventListQuery, EventStreamQuery
from ..params import EventsBody
from ..requests import Call
from ..state import Event
from ..streams import stream


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
    at = event["processed_at"]
    is_type = query.types is None or event["type"] in query.types
    return is_type and query.admits(datetime.fromisoformat(at) if at else None)


async def stream_events(call: Call) -> Response:
    """Live events only, no replay (documented): a client opens the stream, lists the history and dedupes by id.

    The stream starts here and not at the first byte read, so nothing falls between its opening and that list. Delta
    previews may be asked for; they are best effort and this emulator sends none.
    """
    call.query(EventStreamQuery)
    with call.engine.transact():
        session = call.world.session(call.path["session_id"])
        return stream(call.engine, session.id, session.broadcast)
