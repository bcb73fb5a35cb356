"""The work endpoints, as pollers and workers call them."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from starlette.responses import Response

from .. import replies
from ..engine import wait_event
from ..params import HeartbeatQuery, PageQuery, PollQuery, StopBody, WorkUpdateBody
from ..requests import Call

Json = dict[str, Any]


async def poll(call: Call) -> Json | None:
    """Hand out an item, waiting up to `block_ms` of real time; `null` when there is none (recorded)."""
    query = call.query(PollQuery)
    environment_id = call.path["environment_id"]
    reclaim_after = timedelta(milliseconds=query.reclaim_older_than_ms)
    deadline = time.monotonic() + (query.block_ms or 0) / 1000
    if call.worker_id is not None:
        with call.engine.transact() as now:
            call.world.queue(environment_id).note_poll(call.worker_id, now)
            call.world.changes += 1
    with call.engine.listen(environment_id) as changed:
        while True:
            changed.clear()
            with call.engine.transact() as now:
                item = call.world.hand_out(environment_id, reclaim_after, now)
                if item is not None:
                    return replies.work(item, call.credentials.secret_for(item, now))
            left = deadline - time.monotonic()
            if left <= 0 or call.engine.is_closing:
                return None
            await wait_event(changed, left)


async def ack(call: Call) -> Json:
    call.no_query()
    call.no_body()
    with call.engine.transact() as now:
        item = call.world.queue(call.path["environment_id"]).ack(call.path["work_id"], now)
        call.world.changes += 1
        return replies.work(item)


async def heartbeat(call: Call) -> Json:
    call.no_body()
    query = call.query(HeartbeatQuery)
    ttl = timedelta(seconds=query.desired_ttl_seconds) if query.desired_ttl_seconds else None
    with call.engine.transact() as now:
        queue = call.world.queue(call.path["environment_id"])
        is_extended = queue.heartbeat(call.path["work_id"], now, query.expected_last_heartbeat, ttl)
        call.world.changes += 1
        return replies.heartbeat(queue.get(call.path["work_id"]), is_extended=is_extended)


async def stop(call: Call) -> Json | Response:
    """200 with the item as the stop left it (recorded); a re-queue that follows shows on the next look."""
    call.no_query()
    body = call.body(StopBody)
    with call.engine.transact() as now:
        item = call.world.queue(call.path["environment_id"]).stop(call.path["work_id"], now, force=body.force)
        reply = replies.work(item)
        call.world.stopped(item, now)
        return Response(status_code=204) if call.engine.switches.stop_reply == 204 else reply


async def list_work(call: Call) -> Json:
    query = call.query(PageQuery)
    with call.engine.transact():
        items = call.world.queue(call.path["environment_id"]).newest_first()
        shown, next_page = replies.page(items, lambda item: item.id, query.limit, query.page)
        return {"data": [replies.work(item) for item in shown], "next_page": next_page}


async def get_work(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.work(call.world.queue(call.path["environment_id"]).get(call.path["work_id"]))


async def update_work(call: Call) -> Json:
    call.no_query()
    patch = call.body(WorkUpdateBody).metadata
    with call.engine.transact():
        item = call.world.queue(call.path["environment_id"]).update_metadata(call.path["work_id"], patch)
        call.world.changes += 1
        return replies.work(item)


async def work_stats(call: Call) -> Json:
    call.no_query()
    with call.engine.transact() as now:
        return call.world.queue(call.path["environment_id"]).stats(now)
