"""Vercel's Sandbox API on loopback, as the real Python SDK speaks it.

It refuses what it does not know: a route, a query parameter, a field of a body. Tests read `refused`, which must stay
empty, and `requests`, which is everything that was sent.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.fakes.server import Server

from .machine import CWD, Machine, copy_disk, make_disk
from .state import Command, Refused, Sandbox, Session, Snapshot, new_id, now_ms

TEAM, PROJECT = "team_double", "prj_double"
DEFAULT_TIMEOUT_MS = 300_000
PAGE = 20
_CREATE = {"projectId", "name", "image", "source", "timeout", "resources", "persistent", "networkPolicy", "env", "tags"}
_CREATE |= {"snapshotExpiration", "keepLastSnapshots", "region"}
_COMMAND = {"command", "args", "cwd", "env", "sudo", "wait", "logs", "timeout", "attachStdin"}


def _token() -> str:
    """As the platform gives one to a function (OIDC): the SDK reads the team and the project out of it."""
    claims = {"owner_id": TEAM, "project_id": PROJECT, "exp": 4_000_000_000}
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in ({}, claims, {}))


TOKEN = _token()


@dataclass(frozen=True)
class Sent:
    """One request, as it came."""

    operation: str
    path: str
    body: bytes


@dataclass
class Fault:
    """What goes wrong with the next requests of an operation."""

    operation: str
    status: int = 0
    code: str = ""
    times: int = 1
    after: bool = False
    """Do what was asked first, and then fail."""
    hang_up: bool = False
    """No answer at all: the connection ends."""
    then: Callable[[], object] | None = field(default=None, repr=False)
    """Called on the double's loop just before."""


class FakeVercel:
    """`with FakeVercel(directory) as fake:`, or start() and stop()."""

    def __init__(self, directory: Path, *, shown: Sequence[Path] = (), max_timeout_ms: int = 18_000_000) -> None:
        self.requests: list[Sent] = []
        self.refused: list[str] = []
        self.sandboxes: dict[str, Sandbox] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.boots = 0
        self.max_timeout_ms = max_timeout_ms
        self.delays: dict[str, float] = {}
        """Seconds before an operation answers, by its name."""
        self.stop_seconds = 0.0
        """How long a sandbox is stopping, and refuses everything with a 422, after its stop was asked for."""
        self._sessions: dict[str, Session] = {}
        self._faults: list[Fault] = []
        self._directory = directory
        self._shown = tuple(shown)
        self._lock = threading.RLock()
        directory.mkdir(parents=True, exist_ok=True)
        self._server = Server(Starlette(routes=list(self._routes())), self._close)
        self.url = f"{self._server.url}/api"

    def __enter__(self) -> FakeVercel:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()

    # --- what tests do -----------------------------------------------------------------------------------------------

    def fail(self, operation: str, status: int = 0, code: str = "", **options: Any) -> None:
        self._faults.append(Fault(operation, status, code, **options))

    def calm(self) -> None:
        """Takes back the faults that nobody has met."""
        self._faults.clear()
        self.delays.clear()
        self.stop_seconds = 0.0

    def count(self, operation: str) -> int:
        return sum(sent.operation == operation for sent in self.requests)

    def call(self, action: Callable[[], object]) -> None:
        """Runs `action` on the double's loop, between two requests."""
        done = threading.Event()

        def run() -> None:
            action()
            done.set()

        self._server.loop.call_soon_threadsafe(run)
        if not done.wait(60.0):
            raise RuntimeError("the double's loop is stuck")

    def end_session(self, name: str) -> None:
        """The platform stops a sandbox: its time is up, or its host is lost."""
        self.call(self.sandboxes[name].current.end)

    def lose_snapshot(self, name: str) -> None:
        """A stopped sandbox's disk has expired."""
        self.end_session(name)
        self.sandboxes[name].snapshot_is_gone = True

    def running_commands(self, name: str) -> list[Command]:
        session = self.sandboxes[name].current
        return [each for each in session.commands.values() if each.exit_code is None and session.status == "running"]

    def add_snapshot(self, snapshot_id: str, fill: Callable[[Path], None]) -> None:
        """A snapshot that somebody has made earlier; `fill` puts its files on a new disk."""
        disk = self._directory / snapshot_id
        disk.mkdir()
        make_disk(disk)
        fill(disk)
        self.snapshots[snapshot_id] = Snapshot(snapshot_id, disk, "sbx_elsewhere")

    # --- requests ----------------------------------------------------------------------------------------------------

    def _routes(self) -> Iterable[Route]:
        session = "/api/v2/sandboxes/sessions/{session}"
        command = session + "/cmd/{command}"
        named = "/api/v2/sandboxes/{name}"
        table: list[tuple[str, str, str, Callable[..., Awaitable[Response]], set[str], set[str]]] = [
            ("create", "POST", "/api/v3/sandboxes", self._create, set(), _CREATE),
            ("list", "GET", "/api/v2/sandboxes", self._list, {"project", "limit", "cursor", "sortBy", "sortOrder",
                                                             "namePrefix", "tags"}, set()),
            ("session", "GET", session, self._session, set(), set()),
            ("stop", "POST", session + "/stop", self._stop, set(), set()),
            ("extend", "POST", session + "/extend-timeout", self._extend, set(), {"duration"}),
            ("policy", "POST", session + "/network-policy", self._policy, set(), {"mode", "allow", "subnets"}),
            ("snapshot", "POST", session + "/snapshot", self._snapshot, set(), {"expiration"}),
            ("exec", "POST", session + "/cmd", self._exec, {"wait", "logs"}, _COMMAND),
            ("commands", "GET", session + "/cmd", self._commands, set(), set()),
            ("command", "GET", command, self._command, {"wait"}, set()),
            ("logs", "GET", command + "/logs", self._logs, set(), set()),
            ("kill", "POST", command + "/kill", self._kill, set(), {"signal"}),
            ("stdin", "POST", command + "/stdin", self._stdin, set(), {"data", "offset", "close"}),
            ("get", "GET", named, self._get, {"projectId", "resume"}, set()),
            ("update", "PATCH", named, self._update, {"projectId"}, {"networkPolicy", "timeout", "tags", "region"}),
            ("delete", "DELETE", named, self._delete, {"projectId", "deleteOrphanSnapshots"}, set()),
        ]  # fmt: skip
        for operation, method, path, handler, query, fields in table:
            yield Route(path, self._endpoint(operation, handler, query, fields), methods=[method])
        yield Route("/{path:path}", self._unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])

    def _endpoint(
        self,
        operation: str,
        handler: Callable[..., Awaitable[Response]],
        query: set[str],
        fields: set[str],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            raw = await request.body()
            self.requests.append(Sent(operation, f"{request.url.path}?{request.url.query}", raw))
            try:
                body = self._checked(request, raw, query, fields)
                await asyncio.sleep(self.delays.get(operation, 0.0))
                fault = self._fault(operation)
                if fault and not fault.after:
                    return self._failed(request, fault)
                reply = await handler(request, body)
            except Refused as error:
                return _error(error)
            return self._failed(request, fault) if fault else reply

        return endpoint

    def _checked(self, request: Request, raw: bytes, query: set[str], fields: set[str]) -> dict[str, Any]:
        if request.headers.get("authorization") != f"Bearer {TOKEN}" or request.query_params.get("teamId") != TEAM:
            raise Refused(403, "forbidden")
        body = json.loads(raw) if raw else {}
        for what in [*(set(request.query_params) - query - {"teamId"}), *(set(body) - fields)]:
            self.refused.append(f"{request.method} {request.url.path}: {what}")
            raise Refused(400, "bad_request", f"unknown: {what}")
        for name in ("projectId", "project"):
            if {**request.query_params, **body}.get(name, PROJECT) != PROJECT:
                raise Refused(403, "forbidden")
        return body

    async def _unknown(self, request: Request) -> Response:
        self.refused.append(f"{request.method} {request.url.path}")
        return _error(Refused(404, "no_such_route"))

    def _fault(self, operation: str) -> Fault | None:
        for fault in self._faults:
            if fault.operation == operation:
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                if fault.then:
                    fault.then()
                return fault if fault.status or fault.hang_up else None
        return None

    def _failed(self, request: Request, fault: Fault) -> Response:
        if fault.hang_up:
            self._server.hang_up(request)
        return _error(Refused(fault.status or 500, fault.code or "internal_error"))

    # --- sandboxes ---------------------------------------------------------------------------------------------------

    async def _create(self, request: Request, body: dict[str, Any]) -> Response:
        name = body.get("name") or new_id("sandbox")
        if name in self.sandboxes:
            raise Refused(409, "sandbox_already_exists")
        if len(body.get("tags") or {}) > 5:
            raise Refused(400, "bad_request", "at most five tags")
        if (timeout := body.get("timeout", DEFAULT_TIMEOUT_MS)) > self.max_timeout_ms:
            raise Refused(400, "bad_request", "the timeout is above the plan's")
        source = body.get("source")
        if source and (source["type"] != "snapshot" or source["snapshotId"] not in self.snapshots):
            raise Refused(404, "snapshot_not_found")
        resources = body.get("resources") or {}
        sandbox = Sandbox(
            name=name,
            project_id=PROJECT,
            disk=self._directory / new_id("disk"),
            tags=body.get("tags") or {},
            timeout_ms=timeout,
            network_policy=body.get("networkPolicy"),
            memory=resources.get("memory", 2048 * resources.get("vcpus", 2)),
            vcpus=resources.get("vcpus", 2),
            image=body.get("image"),
            env=body.get("env") or {},
        )
        sandbox.disk.mkdir()
        if source:
            copy_disk(self.snapshots[source["snapshotId"]].disk, sandbox.disk)
        else:
            make_disk(sandbox.disk)
        self._boot(sandbox)
        self.sandboxes[name] = sandbox
        return self._reply(sandbox)

    async def _list(self, request: Request, body: dict[str, Any]) -> Response:
        query = request.query_params
        found = sorted(self.sandboxes.values(), key=lambda each: each.name)
        found = [each for each in found if each.name.startswith(query.get("namePrefix", ""))]
        for wanted in query.getlist("tags"):
            key, _, value = wanted.partition(":")
            found = [each for each in found if each.tags.get(key) == value]
        start = int(query.get("cursor", "0"))
        page = found[start : start + int(query.get("limit", PAGE))]
        following = str(start + len(page)) if start + len(page) < len(found) else None
        shown = [each.shown() for each in page]
        return JSONResponse({"sandboxes": shown, "pagination": {"count": len(page), "next": following}})

    async def _get(self, request: Request, body: dict[str, Any]) -> Response:
        sandbox = self._named(request)
        resumed = request.query_params.get("resume") == "true" and sandbox.current.status != "running"
        if resumed:
            _refuse_while_stopping(sandbox.current)
            if sandbox.snapshot_is_gone:
                raise Refused(410, "snapshot_not_found")
            self._boot(sandbox)
        return self._reply(sandbox, resumed=resumed)

    async def _update(self, request: Request, body: dict[str, Any]) -> Response:
        sandbox = self._named(request)
        sandbox.network_policy = body.get("networkPolicy", sandbox.network_policy)
        sandbox.timeout_ms = body.get("timeout", sandbox.timeout_ms)
        sandbox.tags = body.get("tags", sandbox.tags)
        return self._reply(sandbox)

    async def _delete(self, request: Request, body: dict[str, Any]) -> Response:
        sandbox = self._named(request)
        reply = self._reply(sandbox)
        sandbox.current.end()
        del self.sandboxes[sandbox.name]
        if request.query_params.get("deleteOrphanSnapshots") == "true":
            for snapshot in list(self.snapshots.values()):
                if snapshot.source_session_id == sandbox.current.id:
                    del self.snapshots[snapshot.id]
        await asyncio.to_thread(shutil.rmtree, sandbox.disk)
        return reply

    def _boot(self, sandbox: Sandbox) -> None:
        machine = Machine(sandbox.disk, self._shown)
        session = Session(new_id("sbx"), sandbox, machine, sandbox.timeout_ms, sandbox.network_policy)
        session.tasks.append(asyncio.create_task(_end_in_time(session)))
        sandbox.session = self._sessions[session.id] = session
        sandbox.status_updated_at = now_ms()
        self.boots += 1

    def _named(self, request: Request) -> Sandbox:
        sandbox = self.sandboxes.get(request.path_params["name"])
        if sandbox is None:
            raise Refused(404, "not_found")
        return sandbox

    def _reply(self, sandbox: Sandbox, **more: Any) -> Response:
        return JSONResponse({"sandbox": sandbox.shown(), "session": sandbox.current.shown(), "routes": [], **more})

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _live(self, request: Request) -> Session:
        session = self._known(request)
        _refuse_while_stopping(session)
        if session.status != "running":
            raise Refused(410, "sandbox_stopped")
        return session

    def _known(self, request: Request) -> Session:
        session = self._sessions.get(request.path_params["session"])
        if session is None:
            raise Refused(404, "not_found")
        return session

    async def _session(self, request: Request, body: dict[str, Any]) -> Response:
        return JSONResponse({"session": self._known(request).shown()})

    async def _stop(self, request: Request, body: dict[str, Any]) -> Response:
        session = self._known(request)
        if self.stop_seconds and session.status == "running":
            session.status = "stopping"
            asyncio.get_running_loop().call_later(self.stop_seconds, session.end)
        elif session.status != "stopping":
            session.end()
        return JSONResponse({"session": session.shown(), "sandbox": session.sandbox.shown()})

    async def _extend(self, request: Request, body: dict[str, Any]) -> Response:
        session = self._live(request)
        if body["duration"] < 1000 or session.timeout_ms + body["duration"] > self.max_timeout_ms:
            raise Refused(400, "bad_request", "the timeout is above the plan's")
        session.timeout_ms += body["duration"]
        return JSONResponse({"session": session.shown()})

    async def _policy(self, request: Request, body: dict[str, Any]) -> Response:
        session = self._live(request)
        session.network_policy = body
        return JSONResponse({"session": session.shown()})

    async def _snapshot(self, request: Request, body: dict[str, Any]) -> Response:
        session = self._live(request)
        snapshot_id = new_id("snap")
        session.end()
        disk = self._directory / snapshot_id
        disk.mkdir()
        await asyncio.to_thread(copy_disk, session.sandbox.disk, disk)
        expires = now_ms() + body["expiration"] if body.get("expiration") else None
        snapshot = self.snapshots[snapshot_id] = Snapshot(snapshot_id, disk, session.id, expires_at=expires)
        return JSONResponse({"snapshot": snapshot.shown(), "session": session.shown()})

    # --- commands ----------------------------------------------------------------------------------------------------

    async def _exec(self, request: Request, body: dict[str, Any]) -> Response:
        session = self._live(request)
        cwd = body.get("cwd") or CWD
        process = await session.machine.start(
            [body["command"], *(body.get("args") or [])],
            cwd=cwd,
            env={**session.sandbox.env, **(body.get("env") or {})},
            root=bool(body.get("sudo")),
            stdin=bool(body.get("attachStdin")),
        )
        command = Command(
            id=new_id("cmd"),
            name=body["command"],
            args=body.get("args") or [],
            cwd=cwd,
            session_id=session.id,
            process=process,
            has_stdin=bool(body.get("attachStdin")),
        )
        session.commands[command.id] = command
        session.tasks.append(asyncio.create_task(command.follow()))
        if body.get("timeout"):
            late = asyncio.get_running_loop().call_later
            late(body["timeout"] / 1000, session.machine.kill, process, 9)
        if body.get("wait"):
            return _ndjson(_with_metadata(command))
        return JSONResponse({"command": command.shown()})

    async def _commands(self, request: Request, body: dict[str, Any]) -> Response:
        return JSONResponse({"commands": [each.shown() for each in self._live(request).commands.values()]})

    async def _command(self, request: Request, body: dict[str, Any]) -> Response:
        command = self._named_command(request)
        if request.query_params.get("wait") == "true":
            async with command.changed:
                await command.changed.wait_for(lambda: command.exit_code is not None)
        return JSONResponse({"command": command.shown()})

    async def _logs(self, request: Request, body: dict[str, Any]) -> Response:
        return _ndjson(_output(self._named_command(request)))

    async def _kill(self, request: Request, body: dict[str, Any]) -> Response:
        command = self._named_command(request)
        self._live(request).machine.kill(command.process, body["signal"])
        return JSONResponse({"command": command.shown()})

    async def _stdin(self, request: Request, body: dict[str, Any]) -> Response:
        command = self._named_command(request)
        pipe = command.process.stdin
        if command.exit_code is not None:
            raise Refused(404, "not_found")
        if pipe is None or pipe.is_closing():
            raise Refused(400, "command_stdin_unavailable")
        data = base64.b64decode(body.get("data", ""))
        data = data[max(0, command.stdin_bytes - body.get("offset", command.stdin_bytes)) :]  # what is here already
        pipe.write(data)
        command.stdin_bytes += len(data)
        if body.get("close"):
            pipe.close()
        with suppress(ConnectionError):
            await pipe.drain()
        return JSONResponse({"command": command.shown(), "bytesWritten": command.stdin_bytes})

    def _named_command(self, request: Request) -> Command:
        command = self._live(request).commands.get(request.path_params["command"])
        if command is None:
            raise Refused(404, "not_found")
        return command

    async def _close(self) -> None:
        for session in self._sessions.values():
            session.end()
        tasks = [task for session in self._sessions.values() for task in session.tasks]
        for task in tasks:
            if not task.done() and "_end_in_time" in repr(task):
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _end_in_time(session: Session) -> None:
    """The execution time limit, which may be extended meanwhile."""
    while session.status == "running" and (left := session.left_ms) > 0:  # noqa: ASYNC110 - it may be extended
        await asyncio.sleep(min(left / 1000, 0.5))
    if session.status == "running":
        session.end()


def _refuse_while_stopping(session: Session) -> None:
    if session.status == "stopping":
        raise Refused(422, "sandbox_stopping")


async def _output(command: Command) -> AsyncIterator[dict[str, Any]]:
    """What a command has written, from its beginning, and what it writes until it ends."""
    seen = 0
    while command.exit_code is None or seen < len(command.output):
        async with command.changed:
            while seen == len(command.output) and command.exit_code is None:
                await command.changed.wait()
        for record in command.output[seen:]:
            yield record
            seen += 1


async def _with_metadata(command: Command) -> AsyncIterator[dict[str, Any]]:
    yield {"command": {**command.shown(), "exitCode": None}}
    async for record in _output(command):
        yield record
    yield {"command": command.shown()}


def _ndjson(records: AsyncIterator[dict[str, Any]]) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        async for record in records:
            yield json.dumps(record).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _error(error: Refused) -> Response:
    return JSONResponse({"error": {"code": error.code, "message": str(error)}}, error.status)
