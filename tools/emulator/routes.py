"""The table of endpoints: method, path, the operation's name in the credential matrix, and what does it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .errors import MethodNotAllowed, NotFound
from .operations import catalog, events, memory, sessions, skills, threads, work
from .requests import Control, Handler

_WORK = "/v1/environments/{environment_id}/work"
_SESSION = "/v1/sessions/{session_id}"
_THREAD = _SESSION + "/threads/{thread_id}"
_SKILL = "/v1/skills/{skill_id}"
_STORE = "/v1/memory_stores/{memory_store_id}"
_MEMORY = _STORE + "/memories/{memory_id}"

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
    ("GET", f"{_SESSION}/threads", "threads.list", threads.list_threads),
    ("GET", _THREAD, "threads.get", threads.get_thread),
    ("POST", f"{_THREAD}/archive", "threads.archive", threads.archive_thread),
    ("GET", f"{_THREAD}/events", "threads.events", threads.list_events),
    ("GET", f"{_THREAD}/stream", "threads.stream", threads.stream_events),
    ("GET", f"{_SESSION}/resources", "sessions.resources", sessions.list_resources),
    ("POST", f"{_SESSION}/resources", "sessions.add_resource", sessions.add_resource),
    ("POST", "/v1/skills", "skills.create", skills.create_skill),
    ("GET", "/v1/skills", "skills.list", skills.list_skills),
    ("GET", _SKILL, "skills.get", skills.get_skill),
    ("DELETE", _SKILL, "skills.delete", skills.delete_skill),
    ("POST", f"{_SKILL}/versions", "skills.create_version", skills.create_version),
    ("GET", f"{_SKILL}/versions", "skills.versions", skills.list_versions),
    ("GET", _SKILL + "/versions/{version}", "skills.version", skills.get_version),
    ("GET", _SKILL + "/versions/{version}/content", "skills.content", skills.get_content),
    ("POST", "/v1/memory_stores", "memory_stores.create", memory.create_store),
    ("GET", "/v1/memory_stores", "memory_stores.list", memory.list_stores),
    ("GET", _STORE, "memory_stores.get", memory.get_store),
    ("POST", _STORE, "memory_stores.update", memory.update_store),
    ("DELETE", _STORE, "memory_stores.delete", memory.delete_store),
    ("POST", f"{_STORE}/archive", "memory_stores.archive", memory.archive_store),
    ("POST", f"{_STORE}/memories", "memories.create", memory.create_memory),
    ("GET", f"{_STORE}/memories", "memories.list", memory.list_memories),
    ("GET", _MEMORY, "memories.get", memory.get_memory),
    ("POST", _MEMORY, "memories.update", memory.update_memory),
    ("DELETE", _MEMORY, "memories.delete", memory.delete_memory),
)

OPERATIONS = frozenset(operation for _, _, operation, _ in ROUTES)


def application(control: Control, more: Sequence[Route] = ()) -> Starlette:
    """The control plane; `more` are routes beside it that ask for no credential."""

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
    app = Starlette(routes=[*routes, *more], exception_handlers=refusals)
    app.router.redirect_slashes = False
    return app
