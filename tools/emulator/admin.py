"""The admin API, `/_emulator/…`: what `Emulator` can do in Python, for clients in other processes and languages.

It asks for no credential: whoever reaches the emulator owns it. A request with a body must say that it is JSON, which
no web page can make a browser do unasked. Scripts come as data, never as code. Nothing here is in the request log.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .admin_params import (
    ClockBody,
    CutBody,
    EnvironmentBody,
    ExecutionBody,
    FaultBody,
    HealthcheckBody,
    ScriptBody,
    SessionBody,
    SinceQuery,
    StopBody,
    WaitQuery,
    WebhookFaultBody,
    WebhooksBody,
)
from .clock import stamp
from .errors import EmulatorError, Invalid, NotFound, envelope, status_of
from .faults import ANY_OPERATION
from .guard import check_origin
from .live import overview_stream, session_stream, webhooks
from .params import EventsBody, Params, json_object, parse
from .requests import body_of
from .routes import OPERATIONS
from .scripts_yaml import steps_of
from .state.ids import new_id
from .switches import values_of

if TYPE_CHECKING:
    from .emulator import Emulator

Json = dict[str, Any]
P = TypeVar("P", bound=Params)


class Admin:
    """The operations; `routes` is the table of them."""

    def __init__(self, emulator: Emulator, *, is_local: bool) -> None:
        self._emulator = emulator
        self._is_local = is_local

    def routes(self) -> list[Route]:
        return [Route(path, self._endpoint(name), methods=[method]) for method, path, name in TABLE]

    def _endpoint(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        operation: Callable[[Request], Awaitable[Any]] = getattr(self, name)

        async def serve(request: Request) -> Response:
            try:
                check_origin(request, is_local=self._is_local)
                result = await operation(request)
                if isinstance(result, Response):
                    return result
                if request.method != "GET":
                    self._emulator._engine.ring()
                return JSONResponse(json.loads(json.dumps(result, default=_plain)))
            except EmulatorError as error:
                return _refusal(error)
            except ValueError as error:
                return _refusal(Invalid(str(error)))

        return serve

    # The whole

    async def state(self, request: Request) -> Json:
        it = self._emulator
        return {
            "url": it.url,
            "environment_id": it.environment_id,
            "environment_key": it.environment_key,
            "api_key": it.api_key,
            "webhook_key": it.webhook_key,
            "agent_id": it.agent_id,
            "now": it.now(),
            "skew": it.clock.skew.total_seconds(),
            "switches": dataclasses.asdict(it.switches),
            "webhooks": webhooks(it),
            "sessions": it.session_ids(),
            "failed_expectations": it.failed_expectations(),
            "requests": len(it.requests),
        }

    async def clock(self, request: Request) -> Json:
        body = await _body(request, ClockBody)
        if body.advance is not None:
            self._emulator.advance(body.advance)
        if body.skew is not None:
            self._emulator.skew(body.skew)
        return {"now": self._emulator.now(), "skew": self._emulator.clock.skew.total_seconds()}

    async def switches(self, request: Request) -> Json:
        return {"values": dataclasses.asdict(self._emulator.switches), "options": values_of()}

    async def switch(self, request: Request) -> Json:
        self._emulator.switch(**await _object(request))
        return await self.switches(request)

    # Faults

    async def faults(self, request: Request) -> Json:
        data = [fault.shown() for fault in self._emulator.faults()]
        return {"data": data, "operations": [ANY_OPERATION, *sorted(OPERATIONS)]}

    async def clear_faults(self, request: Request) -> Json:
        self._emulator.clear_faults()
        return await self.faults(request)

    async def disarm(self, request: Request) -> Json:
        fault_id = request.path_params["fault_id"]
        try:
            self._emulator.disarm(fault_id)
        except KeyError as error:
            raise NotFound(f"fault {fault_id} is not armed") from error
        return await self.faults(request)

    async def fault(self, request: Request) -> Json:
        body = (await _body(request, FaultBody)).model_dump()
        return self._emulator.fault(body.pop("operation"), body.pop("kind"), body.pop("count"), **body).shown()

    async def cut_stream(self, request: Request) -> Json:
        return self._emulator.cut_stream(**(await _body(request, CutBody)).model_dump()).shown()

    async def webhook_fault(self, request: Request) -> Json:
        body = await _body(request, WebhookFaultBody)
        return self._emulator.webhook_fault(body.kind, body.count, seconds=body.seconds).shown()

    # Webhooks

    async def webhooks(self, request: Request) -> Json:
        body = await _body(request, WebhooksBody) if request.method == "POST" else WebhooksBody()
        if "url" in body.model_fields_set:
            self._emulator.set_webhook_url(body.url)
        if body.paused is not None:
            self._emulator.webhooks_paused = body.paused
        if body.enabled:
            self._emulator.enable_webhooks()
        return webhooks(self._emulator)

    async def deliveries(self, request: Request) -> Json:
        return {"data": self._emulator.deliveries[_query(request, SinceQuery).since :]}

    # What happened

    async def requests(self, request: Request) -> Json:
        return {"data": self._emulator.requests[_query(request, SinceQuery).since :]}

    async def executions(self, request: Request) -> Json:
        return {"data": self._emulator.executions[_query(request, SinceQuery).since :]}

    async def report_execution(self, request: Request) -> Any:
        return self._emulator.report_execution(**(await _body(request, ExecutionBody)).model_dump())

    # Environments and sessions

    async def healthcheck(self, request: Request) -> Json:
        return self._emulator.add_healthcheck((await _body(request, HealthcheckBody)).environment_id)

    async def environment(self, request: Request) -> Json:
        id_, key = self._emulator.create_environment((await _body(request, EnvironmentBody)).name)
        return {"environment_id": id_, "environment_key": key}

    async def default_script(self, request: Request) -> Json:
        steps = steps_of((await _body(request, ScriptBody)).steps)
        self._emulator.default_script = steps
        return {"steps": len(steps)}

    async def script(self, request: Request) -> Json:
        steps = steps_of((await _body(request, ScriptBody)).steps)
        self._emulator.set_script(request.path_params["session_id"], steps)
        return {"steps": len(steps)}

    async def create_session(self, request: Request) -> Json:
        body = await _body(request, SessionBody)
        with self._emulator.hold():
            session_id = self._emulator.create_session(body.title, environment_id=body.environment_id)
            if body.text is not None:
                self._emulator.say(session_id, body.text)
            return self._session(session_id)

    async def send(self, request: Request) -> Json:
        events = (await _body(request, EventsBody)).model_dump()["events"]
        return {"data": self._emulator.send(request.path_params["session_id"], *events)}

    async def live(self, request: Request) -> Response:
        return overview_stream(self._emulator)

    async def live_session(self, request: Request) -> Response:
        return session_stream(self._emulator, request.path_params["session_id"])

    async def session(self, request: Request) -> Json:
        return self._session(request.path_params["session_id"])

    def _session(self, session_id: str) -> Json:
        it = self._emulator
        try:
            work: Json | None = it.work(session_id)
        except KeyError:
            work = None
        return {
            "session": it.session(session_id),
            "work": work,
            "events": it.events(session_id),
            "pending_calls": it.pending_calls(session_id),
        }

    async def stop(self, request: Request) -> Json:
        return self._emulator.stop_work(request.path_params["session_id"], (await _body(request, StopBody)).force)

    async def wait(self, request: Request) -> Json:
        """Long polling: the session once it is in the awaited state, or as it is when the time is over."""
        query, session_id = _query(request, WaitQuery), request.path_params["session_id"]
        is_met = await self._emulator.until(lambda: self._emulator.is_in(session_id, query.until), query.timeout)
        return {"is_met": is_met, **self._session(session_id)}


_SESSION = "/_emulator/sessions/{session_id}"
TABLE: tuple[tuple[str, str, str], ...] = (
    ("GET", "/_emulator/state", "state"),
    ("POST", "/_emulator/clock", "clock"),
    ("GET", "/_emulator/switches", "switches"),
    ("POST", "/_emulator/switches", "switch"),
    ("GET", "/_emulator/faults", "faults"),
    ("POST", "/_emulator/faults", "fault"),
    ("DELETE", "/_emulator/faults", "clear_faults"),
    ("DELETE", "/_emulator/faults/{fault_id}", "disarm"),
    ("POST", "/_emulator/stream-cuts", "cut_stream"),
    ("POST", "/_emulator/webhook-faults", "webhook_fault"),
    ("GET", "/_emulator/webhooks", "webhooks"),
    ("POST", "/_emulator/webhooks", "webhooks"),
    ("GET", "/_emulator/deliveries", "deliveries"),
    ("GET", "/_emulator/requests", "requests"),
    ("GET", "/_emulator/executions", "executions"),
    ("POST", "/_emulator/executions", "report_execution"),
    ("POST", "/_emulator/healthchecks", "healthcheck"),
    ("POST", "/_emulator/environments", "environment"),
    ("POST", "/_emulator/script", "default_script"),
    ("POST", "/_emulator/sessions", "create_session"),
    ("GET", _SESSION, "session"),
    ("POST", _SESSION + "/events", "send"),
    ("POST", _SESSION + "/script", "script"),
    ("POST", _SESSION + "/stop", "stop"),
    ("GET", _SESSION + "/wait", "wait"),
    ("GET", "/_emulator/live", "live"),
    ("GET", _SESSION + "/live", "live_session"),
)


async def _object(request: Request) -> Json:
    content = await body_of(request)
    if not content:
        return {}
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Invalid("content-type: the admin API takes application/json only")
    return json_object(content)


async def _body(request: Request, model: type[P]) -> P:
    return parse(model, await _object(request), "body")


def _query(request: Request, model: type[P]) -> P:
    return parse(model, dict(request.query_params), "query")


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return stamp(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


def _refusal(error: EmulatorError) -> Response:
    return JSONResponse(envelope(error, new_id("req")), status_code=status_of(error))
