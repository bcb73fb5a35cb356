"""The endpoints: a table of method, path and operation, one small function each."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import replies
from .engine import wait_event
from .errors import MethodNotAllowed, NotFound
from .params import (
    AgentCreateBody,
    EnvironmentCreateBody,
    EnvironmentUpdateBody,
    EventsBody,
    HeartbeatQuery,
    PageQuery,
    PollQuery,
    SessionCreateBody,
    SessionListQuery,
    SessionUpdateBody,
    StopBody,
    WorkUpdateBody,
)
from .requests import Call, Control, Handler
from .streams import list_events, stream_events

Json = dict[str, Any]

# Work


async def poll(call: Call) -> Json | None:
    """Hand out an item, waiting up to `block_ms` of real time; `null` when there is none (recorded)."""
    query = call.query(PollQuery)
    environment_id = call.path["environment_id"]
    reclaim_after = timedelta(milliseconds=query.reclaim_older_than_ms)
    deadline = time.monotonic() + (query.block_ms or 0) / 1000
    if call.worker_id is not None:
        with call.engine.transact() as now:
            call.world.queue(environment_id).note_poll(call.worker_id, now)
    with call.engine.listen() as changed:
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


async def stop(call: Call) -> Json:
    """200 with the item as the stop left it (recorded); a re-queue that follows shows on the next look."""
    call.no_query()
    body = call.body(StopBody)
    with call.engine.transact() as now:
        item = call.world.queue(call.path["environment_id"]).stop(call.path["work_id"], now, force=body.force)
        reply = replies.work(item)
        call.world.stopped(item, now)
        return reply


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


# Environments and agents


async def create_environment(call: Call) -> Json:
    body = call.body(EnvironmentCreateBody)
    with call.engine.transact() as now:
        return replies.environment(call.world.create_environment(body, now))


async def list_environments(call: Call) -> Json:
    query = call.query(PageQuery)
    with call.engine.transact():
        items = [it for it in reversed(call.world.environments.values()) if it.archived_at is None]
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.environment(it) for it in shown], "next_page": next_page}


async def get_environment(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.environment(call.world.environment(call.path["environment_id"]))


async def update_environment(call: Call) -> Json:
    body = call.body(EnvironmentUpdateBody)
    with call.engine.transact() as now:
        environment = call.world.environment(call.path["environment_id"])
        environment.update(body, now)
        return replies.environment(environment)


async def archive_environment(call: Call) -> Json:
    call.no_body()
    with call.engine.transact() as now:
        environment = call.world.environment(call.path["environment_id"])
        environment.archive(now)
        return replies.environment(environment)


async def create_agent(call: Call) -> Json:
    body = call.body(AgentCreateBody)
    with call.engine.transact() as now:
        return replies.agent(call.world.create_agent(body, now))


async def list_agents(call: Call) -> Json:
    query = call.query(PageQuery)
    with call.engine.transact():
        items = list(reversed(call.world.agents.values()))
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.agent(it) for it in shown], "next_page": next_page}


async def get_agent(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.agent(call.world.agent(call.path["agent_id"]))


# Sessions


async def create_session(call: Call) -> Json:
    body = call.body(SessionCreateBody)
    with call.engine.transact() as now:
        return replies.session(call.world.create_session(body, now), now)


async def list_sessions(call: Call) -> Json:
    query = call.query(SessionListQuery)
    with call.engine.transact() as now:
        items = [
            it
            for it in call.world.sessions.values()
            if (query.include_archived or it.archived_at is None)
            and (query.statuses is None or it.status in query.statuses)
        ]
        items = items if query.order == "asc" else items[::-1]
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.session(it, now) for it in shown], "next_page": next_page}


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


async def send_events(call: Call) -> Json:
    call.no_query()
    inbound = call.body(EventsBody).events
    call.credentials.check_events(call.credential, {event.type for event in inbound})
    with call.engine.transact() as now:
        return {"data": call.world.send(call.path["session_id"], inbound, now)}


_WORK = "/v1/environments/{environment_id}/work"
_SESSION = "/v1/sessions/{session_id}"

ROUTES: tuple[tuple[str, str, str, Handler], ...] = (
    ("GET", f"{_WORK}/poll", "work.poll", poll),
    ("GET", f"{_WORK}/stats", "work.stats", work_stats),
    ("GET", _WORK, "work.list", list_work),
    ("GET", _WORK + "/{work_id}", "work.get", get_work),
    ("POST", _WORK + "/{work_id}", "work.update", update_work),
    ("POST", _WORK + "/{work_id}/ack", "work.ack", ack),
    ("POST", _WORK + "/{work_id}/heartbeat", "work.heartbeat", heartbeat),
    ("POST", _WORK + "/{work_id}/stop", "work.stop", stop),
    ("POST", "/v1/environments", "environments.create", create_environment),
    ("GET", "/v1/environments", "environments.list", list_environments),
    ("GET", "/v1/environments/{environment_id}", "environments.get", get_environment),
    ("POST", "/v1/environments/{environment_id}", "environments.update", update_environment),
    ("POST", "/v1/environments/{environment_id}/archive", "environments.archive", archive_environment),
    ("POST", "/v1/agents", "agents.create", create_agent),
    ("GET", "/v1/agents", "agents.list", list_agents),
    ("GET", "/v1/agents/{agent_id}", "agents.get", get_agent),
    ("POST", "/v1/sessions", "sessions.create", create_session),
    ("GET", "/v1/sessions", "sessions.list", list_sessions),
    ("GET", _SESSION, "sessions.get", get_session),
    ("POST", _SESSION, "sessions.update", update_session),
    ("DELETE", _SESSION, "sessions.delete", delete_session),
    ("POST", f"{_SESSION}/archive", "sessions.archive", archive_session),
    ("POST", f"{_SESSION}/events", "events.send", send_events),
    ("GET", f"{_SESSION}/events", "events.list", list_events),
    ("GET", f"{_SESSION}/events/stream", "events.stream", stream_events),
)


def application(control: Control) -> Starlette:
    def endpoint(operation: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            return await control.serve(request, operation, handler)

        return serve

    async def no_such_route(request: Request, error: Exception) -> Response:
        what = f"{request.method} {request.url.path}"
        if isinstance(error, HTTPException) and error.status_code == 405:
            return control.refuse(request, MethodNotAllowed(f"{what} is not an endpoint of this emulator"))
        return control.refuse(request, NotFound(f"{what} is not an endpoint of this emulator"))

    routes = [Route(path, endpoint(name, handler), methods=[method]) for method, path, name, handler in ROUTES]
    refusals: dict[Any, Any] = {404: no_such_route, 405: no_such_route}
    app = Starlette(routes=routes, exception_handlers=refusals)
    app.router.redirect_slashes = False
    return app
