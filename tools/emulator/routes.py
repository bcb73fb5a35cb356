"""The table of endpoints: method, path, the operation's name in the credential matrix, and what does it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .errors import MethodNotAllowed, NotFound
from .operations import catalog, events, sessions, work
from .requests import Control, Handler

_WORK = "/v1/environments/{environment_id}/work"
_SESSION = "/v1/sessions/{session_id}"

ROUTES: tuple[tuple[str, str, str, Handler], ...] = (
    ("GET", f"{_WORK}/poll", "work.poll", work.poll),
    ("GET", f"{_WORK}/stats", "work.stats", work.work_stats),
    ("GET", _WORK, "work.list", work.list_work),
    ("GET", _WORK + "/{work_id}", "work.get", work.get_work),
    ("POST", _WORK + "/{work_id}", "work.update", work.update_work),
    ("POST", _WORK + "/{work_id}/ack", "work.ack", work.ack),
    ("POST", _WORK + "/{work_id}/heartbeat", "work.heartbeat", work.heartbeat),
    ("POST", _WORK + "/{work_id}/stop", "work.stop", work.stop),
    ("POST", "/v1/environments", "environments.create", catalog.create_environment),
    ("GET", "/v1/environments", "environments.list", catalog.list_environments),
    ("GET", "/v1/environments/{environment_id}", "environments.get", catalog.get_environment),
    ("POST", "/v1/environments/{environment_id}", "environments.update", catalog.update_environment),
    ("POST", "/v1/environments/{environment_id}/archive", "environments.archive", catalog.archive_environment),
    ("POST", "/v1/agents", "agents.create", catalog.create_agent),
    ("GET", "/v1/agents", "agents.list", catalog.list_agents),
    ("GET", "/v1/agents/{agent_id}", "agents.get", catalog.get_agent),
    ("POST", "/v1/sessions", "sessions.create", sessions.create_session),
    ("GET", "/v1/sessions", "sessions.list", sessions.list_sessions),
    ("GET", _SESSION, "sessions.get", sessions.get_session),
    ("POST", _SESSION, "sessions.update", sessions.update_session),
    ("DELETE", _SESSION, "sessions.delete", sessions.delete_session),
    ("POST", f"{_SESSION}/archive", "sessions.archive", sessions.archive_session),
    ("POST", f"{_SESSION}/events", "events.send", events.send_events),
    ("GET", f"{_SESSION}/events", "events.list", events.list_events),
    ("GET", f"{_SESSION}/events/stream", "events.stream", events.stream_events),
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
