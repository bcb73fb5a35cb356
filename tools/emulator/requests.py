"""The frame around every request: who asks, what exactly, how it is logged, and how an error looks.

A request that names a route, a field or a parameter the emulator does not know is refused by name, so that a client
cannot depend on something the emulator silently ignores.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .credentials import Credential, Credentials
from .engine import Engine
from .errors import EmulatorError, Injected, Invalid, NotFound, envelope, status_of
from .faults import Fault, Faults, OpenStream, client_of
from .params import NoParams, Params, json_object, parse
from .shown import ShownClock
from .state.ids import new_id

MAX_BODY_BYTES = 32 * 1024 * 1024
BETA = "managed-agents-2026-04-01"

P = TypeVar("P", bound=Params)


@dataclass(frozen=True)
class RequestRecord:
    """One line of the request log."""

    at: datetime
    method: str
    path: str
    query: dict[str, list[str]]
    status: int
    operation: str | None
    """The emulator's name for the endpoint, as in the credential matrix: `work.poll`, `events.send`, …"""
    helper: str | None
    """The `x-stainless-helper` header: which part of an SDK asked."""
    credential: str
    """`api_key`, `environment_key`, `sessions_token`, `unknown` or `none`."""
    worker_id: str | None
    request_id: str
    fault: str | None = None
    """The kind of fault it met. `status` is then what the emulator meant to say; 0 when it did not get to it."""


class Call:
    """One request, as an operation sees it."""

    def __init__(self, request: Request, body: bytes, credential: Credential, control: Control) -> None:
        self._request = request
        self._body = body
        self.credential = credential
        self.path: dict[str, str] = request.path_params
        self.engine = control.engine
        self.world = control.engine.world
        self.credentials = control.credentials
        self._shown = control.shown
        self.worker_id = request.headers.get("anthropic-worker-id")
        self.betas = {beta.strip() for beta in request.headers.get("anthropic-beta", "").split(",")}
        self.content, self.content_type = body, request.headers.get("content-type", "")

    def query(self, model: type[P]) -> P:
        """The query, checked. `beta=true` is what older SDKs append to every call (recorded)."""
        values: dict[str, Any] = {}
        for name, value in self._request.query_params.multi_items():
            if name == "beta" and value == "true":
                continue
            if name.endswith("[]"):
                values.setdefault(name, []).append(value)
            elif name in values:
                raise Invalid(f"{name}: given more than once")
            else:
                values[name] = value
        return parse(model, self._shown.query(values), "query")

    def body(self, model: type[P]) -> P:
        if not self._body:
            return parse(model, {}, "body")
        return parse(model, json_object(self._body), "body")

    def no_body(self) -> None:
        self.body(NoParams)

    def no_query(self) -> None:
        self.query(NoParams)


Handler = Callable[[Call], Awaitable[Response | dict[str, Any] | None]]


class Control:
    """What all requests share: the engine, the credentials, the faults, the clock they are shown and the log."""

    def __init__(
        self,
        engine: Engine,
        credentials: Credentials,
        faults: Faults,
        shown: ShownClock,
        log: list[RequestRecord],
    ) -> None:
        self.engine = engine
        self.credentials = credentials
        self.faults = faults
        self.shown = shown
        self._log = log

    async def serve(self, request: Request, operation: str, handler: Handler) -> Response:
        """Run one operation, as the fault that it meets has it."""
        met = self.faults.meet(operation)
        fault = met.fault if met else None

        def refuse(status: int) -> Response:
            return self._refuse(request, Injected(status), operation, fault)

        return await self.faults.carry_out(
            met, request, lambda: self._serve(request, operation, handler, fault), refuse
        )

    async def _serve(self, request: Request, operation: str, handler: Handler, fault: Fault | None) -> Response:
        """What is no response already becomes the JSON body of a 200."""
        request_id = new_id("req")
        try:
            result = await handler(await self._admit(request, operation))
        except EmulatorError as error:
            return self._refuse(request, error, operation, fault)
        response = result if isinstance(result, Response) else JSONResponse(self.shown.body(result))
        if isinstance(response, StreamingResponse) and response.media_type == "text/event-stream":
            stream = OpenStream(request.path_params["session_id"], client_of(request))
            response.body_iterator = self.faults.pass_on(stream, self._shown_frames(response.body_iterator))
        return self._finish(request, operation, response, request_id, fault)

    async def _shown_frames(self, frames: AsyncIterable[Any]) -> AsyncIterator[str]:
        async for frame in frames:
            yield self.shown.frame(frame)

    def refuse(self, request: Request, error: EmulatorError) -> Response:
        """Answer a request that reached no operation."""
        return self._refuse(request, error, None, None)

    def _refuse(self, request: Request, error: EmulatorError, operation: str | None, fault: Fault | None) -> Response:
        request_id = new_id("req")
        body = self.shown.body(envelope(error, request_id))
        response = JSONResponse(body, status_code=status_of(error))
        return self._finish(request, operation, response, request_id, fault)

    async def _admit(self, request: Request, operation: str) -> Call:
        credential = self.credentials.identify(_credential_of(request))
        with self.engine.transact() as now:
            self.credentials.check_age(credential, self.engine.world, now)
            self.credentials.authorise(credential, operation, request.path_params, self.engine.world)
        if request.url.path.startswith("/v1/sessions") and BETA not in request.headers.get("anthropic-beta", ""):
            raise NotFound(f"{request.url.path} needs the header anthropic-beta: {BETA}")  # documented: 404 without it
        return Call(request, await body_of(request), credential, self)

    def _finish(
        self, request: Request, operation: str | None, response: Response, request_id: str, fault: Fault | None
    ) -> Response:
        now = self.engine.clock.now()
        response.headers["request-id"] = request_id
        response.headers["date"] = self.shown.date()
        query: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            query.setdefault(name, []).append(value)
        record = RequestRecord(
            at=now,
            method=request.method,
            path=request.url.path,
            query=query,
            status=response.status_code,
            operation=operation,
            helper=request.headers.get("x-stainless-helper"),
            credential=self.credentials.kind_of(_credential_of(request)),
            worker_id=request.headers.get("anthropic-worker-id"),
            request_id=request_id,
            fault=fault.kind if fault else None,
        )
        self._log.append(record)
        self.engine.ring()
        return response


async def body_of(request: Request) -> bytes:
    """The body; Invalid as soon as it is too large, not when all of it is here. It may be asked for again."""
    if (read := getattr(request.state, "body", None)) is None:
        read = bytearray()
        if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
            raise Invalid(f"body: larger than {MAX_BODY_BYTES} bytes")
        async for chunk in request.stream():
            read += chunk
            if len(read) > MAX_BODY_BYTES:
                raise Invalid(f"body: larger than {MAX_BODY_BYTES} bytes")
        request.state.body = read
    return bytes(read)


def _credential_of(request: Request) -> str | None:
    """Either header carries any kind: the newest SDK sends API keys as bearer tokens too, older ones do not."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return request.headers.get("x-api-key")
