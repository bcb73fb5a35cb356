"""A double of Daytona: its API and its toolbox proxy over HTTP, for the real `daytona` client. Its commands are real.

What it cannot show first. A sandbox is bubblewrap on this machine, not a container: its files, processes and user are
its own, its network is the machine's, so allow-lists are recorded and not enforced. An image is a directory of files.
There is no gateway of events (the client then polls, as with any API that has none), no terminal, no log stream.

What it keeps to: names are unique; a sandbox goes through its states, and refuses what its state does not allow;
stopping kills, and keeps the disk; the intervals of auto-stop, auto-archive and auto-delete run (`minute` says how
fast); what it does not know, it refuses and lists in `refused`. Each request is in `requests`, with what was sent.
`fault` makes the next requests of one operation go wrong; `seconds` makes a change of state take its time.

How Daytona answers was read in its client (0.226.1) and in its published sources (June 2026); no account was asked.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

from aiohttp import BodyPartReader, web

from tests.fakes.daytona_image import build
from tests.folders import load_folder

DAEMON = Path(__file__).with_name("daytona_daemon.py")
KEY = "dtn_double"
_BUBBLEWRAP = load_folder("local").module("bubblewrap")
_UPLOADED = web.RequestKey("uploaded", bytes)
_MEMORY_BYTES = 512 << 20
_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.05

Kind = Literal["fail", "drop", "lose", "hang", "stale"]
# What `fault` and `seconds` may name.
CHANGES = ("create", "start", "stop", "restore", "delete", "bake", "remove", "activate")
OPERATIONS = (
    *("create", "get", "list", "start", "stop", "delete", "archive", "recover", "autostop", "autoarchive"),
    *("autodelete", "activity", "execute", "upload", "session.create", "session.list", "session.get"),
    *("session.delete", "session.exec", "session.command", "session.logs", "session.input"),
    *("snapshot.get", "snapshot.create", "snapshot.list", "snapshot.delete", "snapshot.logs", "snapshot.activate"),
)
_CREATE_FIELDS = {
    *("name", "snapshot", "user", "env", "labels", "public", "target", "volumes", "kvm", "spot", "autoStopInterval"),
    *("autoArchiveInterval", "autoDeleteInterval", "networkBlockAll", "networkAllowList", "domainAllowList"),
}
_FIELDS: dict[str, tuple[set[str], set[str]]] = {  # required, optional
    "execute": ({"command"}, {"cwd", "envs", "timeout"}),
    "session.create": ({"sessionId"}, set()),
    "session.exec": ({"command"}, {"runAsync", "suppressInputEcho"}),
    "session.input": ({"data"}, set()),
}


@dataclass
class Fault:
    """What happens to the next `times` requests of an operation, after `after` of them have passed.

    `fail`: not carried out, answered with `status` and `headers`. `drop`: not carried out, and the connection ends.
    `lose`: carried out, and the connection ends. `hang`: carried out, answered `seconds` later. `stale` (of `list`):
    answered as it would have been when the fault was armed."""

    operation: str
    kind: Kind
    times: int = 1
    status: int = 500
    seconds: float = 0.0
    after: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    hits: int = 0
    old: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """One request."""

    operation: str
    path: str
    body: bytes
    status: int


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Box:
    """One sandbox."""

    id: str
    name: str
    asked: dict[str, Any]
    directory: Path
    image: Path
    state: str = "started"
    desired: str = "started"
    error: str | None = None
    recoverable: bool = False
    created_at: float = field(default_factory=time.time)
    used_at: float = field(default_factory=time.time)
    changed_at: float = field(default_factory=time.time)
    intervals: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    life: int = -1
    address: str = ""

    def enter(self, state: str) -> None:
        self.state, self.changed_at = state, time.time()


class DaytonaDouble:
    """The account. `with DaytonaDouble(path) as daytona:` serves it; nothing is left running behind it."""

    def __init__(self, root: Path, *, key: str = KEY) -> None:
        self.root = root
        self.key = key
        self.boxes: dict[str, Box] = {}
        self.images: dict[str, Path] = {}
        """The snapshots, by name: the directory that is their file system's /opt."""
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.volumes: set[str] = set()
        self.requests: list[Seen] = []
        self.refused: list[str] = []
        self.seconds: dict[str, float] = dict.fromkeys(CHANGES, 0.0)
        self.minute = 60.0
        """Seconds in a minute of an interval."""
        self.quota: int | None = None
        """How many sandboxes may run at once."""
        self.page = 100
        """How many entries one page of a list has at most."""
        self.readable: list[Path] = []
        """More directories of this machine that sandboxes can read."""
        self._faults: list[Fault] = []
        self._changes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._runner: web.AppRunner | None = None
        self._sockets = ""
        self._port = 0

    # --- life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self._sockets = tempfile.mkdtemp(prefix="dtn-", dir="/tmp")  # the path of a socket must be short
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._serve())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join(_PATIENCE_SECONDS)
        self._loop.close()
        shutil.rmtree(self._sockets)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/api"

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_SECONDS)

    async def _serve(self) -> None:
        # What a client that went away had asked for is done all the same.
        self._runner = web.AppRunner(self._application(), handler_cancellation=False, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        self._port = listener.getsockname()[1]
        await web.SockSite(self._runner, listener).start()
        self._changes.add(asyncio.create_task(self._mind_intervals()))

    async def _close(self) -> None:
        for task in list(self._changes):
            task.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        for box in self.boxes.values():
            await self._end(box)
        assert self._runner is not None
        await self._runner.cleanup()

    # --- for tests ---------------------------------------------------------------------------------------------------

    def add_snapshot(self, name: str, files: Mapping[str, Path]) -> None:
        """A snapshot that somebody has baked: what lies in these directories is at /opt/<name> in its sandboxes."""
        image = self._empty_image()
        for place, source in files.items():
            shutil.copytree(source, image / place, ignore=shutil.ignore_patterns("__pycache__"))
        self._register(name, image, {})

    def fault(
        self,
        operation: str,
        kind: Kind,
        times: int = 1,
        *,
        status: int = 500,
        seconds: float = 0.0,
        after: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Fault:
        if operation not in OPERATIONS or kind not in get_args(Kind) or (kind == "stale") > (operation == "list"):
            raise ValueError(f"no such fault: {kind} of {operation}")
        fault = Fault(operation, kind, times, status, seconds, after, headers or {})
        fault.old = [self._shown(box) for box in self.existing()]
        self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        self._faults.clear()
        self.seconds = dict.fromkeys(CHANGES, 0.0)

    def existing(self) -> list[Box]:
        return [box for box in list(self.boxes.values()) if box.state != "destroyed"]

    def box(self, session_id: str) -> Box:
        """The sandbox of a session. KeyError when there is none."""
        for box in self.existing():
            if session_id in (box.name, *box.asked.get("labels", {}).values()):
                return box
        raise KeyError(session_id)

    def kill(self, box: Box, state: str = "error", *, recoverable: bool = False) -> None:
        """The machine below it fails."""

        async def fail() -> None:
            box.enter(state)
            box.error, box.recoverable = "the machine failed", recoverable
            await self._end(box)

        self._call(fail())

    def vanish(self, box: Box) -> None:
        """Somebody deletes it in the dashboard."""
        self._call(self._destroy(box))

    def stop(self, box: Box) -> None:
        """Its auto-stop interval is over."""
        self._call(self._stop(box))

    def archive(self, box: Box) -> None:
        """Its auto-archive interval is over."""
        self._call(self._stop(box))
        box.enter("archived")
        box.desired = "archived"

    def count(self, operation: str, status: int | None = None) -> int:
        return sum(seen.operation == operation and status in (None, seen.status) for seen in list(self.requests))

    # --- requests ----------------------------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        one, tool = "/api/sandbox/{box}", "/toolbox/{box}"
        session = tool + "/process/session/{sessionId}"
        routes: list[tuple[str, str, str, Callable[..., Awaitable[web.Response]]]] = [
            ("POST", "/api/sandbox", "create", self._create),
            ("GET", "/api/sandbox", "list", self._list),
            ("GET", one, "get", self._get),
            ("DELETE", one, "delete", self._delete),
            ("POST", one + "/start", "start", self._start),
            ("POST", one + "/recover", "recover", self._recover),
            ("POST", one + "/last-activity", "activity", self._activity),
            ("POST", one + "/autostop/{minutes}", "autostop", self._interval),
            ("POST", one + "/autoarchive/{minutes}", "autoarchive", self._interval),
            ("POST", one + "/autodelete/{minutes}", "autodelete", self._interval),
            ("GET", "/api/snapshots/{name}", "snapshot.get", self._snapshot_get),
            ("GET", "/api/snapshots/{name}/build-logs-url", "snapshot.logs", self._snapshot_logs_url),
            ("GET", "/api/build-logs/{name}", "snapshot.logs", self._snapshot_logs),
            ("GET", "/api/snapshots", "snapshot.list", self._snapshot_list),
            ("POST", "/api/snapshots", "snapshot.create", self._snapshot_create),
            ("DELETE", "/api/snapshots/{name}", "snapshot.delete", self._snapshot_delete),
            ("POST", "/api/snapshots/{name}/activate", "snapshot.activate", self._snapshot_activate),
            ("POST", tool + "/process/execute", "execute", self._toolbox),
            ("POST", tool + "/files/bulk-upload", "upload", self._upload),
            ("GET", tool + "/process/session", "session.list", self._toolbox),
            ("POST", tool + "/process/session", "session.create", self._toolbox),
            ("GET", session, "session.get", self._toolbox),
            ("DELETE", session, "session.delete", self._toolbox),
            ("POST", session + "/exec", "session.exec", self._toolbox),
            ("GET", session + "/command/{commandId}", "session.command", self._toolbox),
            ("GET", session + "/command/{commandId}/logs", "session.logs", self._toolbox),
            ("POST", session + "/command/{commandId}/input", "session.input", self._toolbox),
        ]
        for method, path, operation, handler in routes:
            app.router.add_route(method, path, self._handler(operation, handler))
        app.router.add_route("*", "/{tail:.*}", self._unknown)
        return app

    def _handler(
        self, operation: str, handler: Callable[..., Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = b"" if operation == "upload" else await request.read()
            fault = self._meet(operation)
            if fault is not None and fault.kind == "drop":
                return self._hang_up(request, operation, body)
            if request.headers.get("authorization") != f"Bearer {self.key}":
                response = _error(401, "Invalid credentials")
            elif fault is not None and fault.kind == "fail":
                response = _error(fault.status, "it was asked to fail")
                response.headers.update(fault.headers)
            elif fault is not None and fault.kind == "stale":
                response = web.json_response({"items": fault.old, "nextCursor": None})
            else:
                try:
                    response = await handler(request, operation, body)
                except Refused as refused:
                    response = _error(refused.status, str(refused))
            if fault is not None and fault.kind == "lose":
                return self._hang_up(request, operation, body)
            if fault is not None and fault.kind == "hang":
                await asyncio.sleep(fault.seconds)
            self.requests.append(Seen(operation, request.path_qs, body or request.get(_UPLOADED, b""), response.status))
            return response

        return handle

    def _meet(self, operation: str) -> Fault | None:
        for fault in self._faults:
            if fault.operation == operation and fault.hits < fault.times:
                if fault.after:
                    fault.after -= 1
                    return None
                fault.hits += 1
                return fault
        return None

    def _hang_up(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        self.requests.append(Seen(operation, request.path_qs, body, 0))
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _unknown(self, request: web.Request) -> web.Response:
        if not request.path.startswith("/api/socket.io/"):  # the gateway of events, which this API has not
            self.refused.append(f"{request.method} {request.path_qs}")
        return _error(404, "Cannot find it")

    def _fields(self, operation: str, body: bytes, required: set[str], optional: set[str]) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(body) if body else {}
        values = {name: value for name, value in values.items() if value is not None}
        if values.keys() - required - optional or required - values.keys():
            self.refused.append(f"{operation}: {', '.join(values)}")
            raise Refused(400, f"unknown or missing fields: {', '.join(values)}")
        return values

    # --- sandboxes ---------------------------------------------------------------------------------------------------

    def _find(self, request: web.Request) -> Box:
        wanted = request.match_info["box"]
        for box in self.existing():
            if wanted in (box.id, box.name):
                return box
        raise Refused(404, f"Sandbox with ID or name {wanted} not found")

    async def _create(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        asked = self._fields(operation, body, {"name", "snapshot"}, _CREATE_FIELDS)
        if asked.get("kvm") or asked.get("spot"):
            raise Refused(400, "not to be had here")
        if asked["snapshot"] not in self.images:
            raise Refused(400, f"Snapshot {asked['snapshot']} not found. Did you add it through the Daytona Dashboard?")
        if (state := self.snapshots[asked["snapshot"]]["state"]) != "active":
            raise Refused(400, f"Snapshot {asked['snapshot']} is {state}")
        if missing := [each["volumeId"] for each in asked.get("volumes", []) if each["volumeId"] not in self.volumes]:
            raise Refused(400, f"Volume '{missing[0]}' not found")
        if any(box.name == asked["name"] for box in self.existing()):
            raise Refused(409, f"Sandbox with name {asked['name']} already exists")
        self._check_quota()
        id_ = str(uuid.uuid4())
        box = Box(id_, asked["name"], asked, self.root / id_, self.images[asked["snapshot"]])
        for name in ("autoStopInterval", "autoArchiveInterval", "autoDeleteInterval"):
            box.intervals[name] = asked.get(name, {"autoStopInterval": 15, "autoArchiveInterval": 10080}.get(name, -1))
        uid = _BUBBLEWRAP.uid_for(box.id)
        for part in ("workspace", "home"):
            (box.directory / part).mkdir(parents=True)
            if uid:
                os.chown(box.directory / part, uid, uid)
        self.boxes[id_] = box
        await self._change(box, "create", "creating", self._started)
        return web.json_response(self._shown(box))

    def _check_quota(self) -> None:
        running = [box for box in self.existing() if box.state in ("started", "starting", "creating", "restoring")]
        if self.quota is not None and len(running) >= self.quota:
            raise Refused(400, f"Total CPU limit exceeded. Maximum allowed: {self.quota}.")

    async def _list(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        if unknown := request.query.keys() - {"labels", "limit", "cursor"}:
            self.refused.append(f"list: {', '.join(unknown)}")
            raise Refused(400, "unknown query")
        labels = json.loads(request.query.get("labels", "{}")).items()
        boxes = [box for box in self.existing() if labels <= box.asked.get("labels", {}).items()]
        first, limit = int(request.query.get("cursor", "0")), min(self.page, int(request.query.get("limit", "100")))
        page = [self._shown(box) for box in boxes[first : first + limit]]
        return web.json_response({"items": page, "nextCursor": str(first + limit) if boxes[first + limit :] else None})

    async def _get(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        return web.json_response(self._shown(self._find(request)))

    async def _delete(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        box = self._find(request)
        if box.state == "destroying":
            raise Refused(409, "Sandbox state change in progress")
        box.desired = "destroyed"
        await self._change(box, "delete", "destroying", self._destroy)
        return web.json_response(self._shown(box))

    async def _start(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        box = self._find(request)
        if box.state == "started":
            return web.json_response(self._shown(box))
        if box.state in ("error", "build_failed"):
            raise Refused(400, "Sandbox is in an errored state")
        if box.state not in ("stopped", "archived", "archiving"):
            raise Refused(409, "Sandbox state change in progress")
        self._check_quota()
        box.desired = "started"
        archived = box.state != "stopped"
        await self._change(
            box, "restore" if archived else "start", "restoring" if archived else "starting", self._started
        )
        return web.json_response(self._shown(box))

    async def _recover(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        box = self._find(request)
        if box.state != "error" or not box.recoverable:
            raise Refused(400, "Sandbox is not in a recoverable state")
        box.desired = "started"
        await self._change(box, "start", "starting", self._started)
        return web.json_response(self._shown(box))

    async def _activity(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        self._find(request).used_at = time.time()
        return web.Response(status=201)

    async def _interval(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        box = self._find(request)
        name = {"autostop": "autoStopInterval", "autoarchive": "autoArchiveInterval"}.get(
            operation, "autoDeleteInterval"
        )
        box.intervals[name] = int(request.match_info["minutes"])
        box.used_at = time.time()
        return web.json_response(self._shown(box))

    def _shown(self, box: Box) -> dict[str, Any]:
        asked = box.asked
        return {
            "id": box.id, "name": box.name, "organizationId": "org", "snapshot": asked["snapshot"],
            "user": asked.get("user", "sandbox"), "env": asked.get("env", {}), "labels": asked.get("labels", {}),
            "public": bool(asked.get("public")), "networkBlockAll": bool(asked.get("networkBlockAll")),
            "networkAllowList": asked.get("networkAllowList"), "domainAllowList": asked.get("domainAllowList"),
            "kvm": False, "spot": False, "target": "us", "cpu": 1, "gpu": 0, "memory": 1, "disk": 3,
            "state": box.state, "desiredState": box.desired, "errorReason": box.error, "recoverable": box.recoverable,
            "volumes": asked.get("volumes", []), "createdAt": _time(box.created_at), "updatedAt": _time(box.changed_at),
            "lastActivityAt": _time(box.used_at), "toolboxProxyUrl": f"http://127.0.0.1:{self._port}/toolbox",
            **box.intervals,
        }  # fmt: skip

    async def _change(self, box: Box, change: str, via: str, end: Callable[[Box], Awaitable[None]]) -> None:
        """At once, or through a state on the way that takes its time, which a test may make shorter meanwhile."""
        if not self.seconds[change]:
            await end(box)
            return
        box.enter(via)

        async def later() -> None:
            began = time.monotonic()
            while (left := began + self.seconds[change] - time.monotonic()) > 0:  # noqa: ASYNC110 - it may change
                await asyncio.sleep(min(left, 0.05))
            if box.state == via:
                await end(box)

        task = asyncio.create_task(later())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def _started(self, box: Box) -> None:
        self._boot(box)
        box.used_at = time.time()
        box.error, box.recoverable = None, False
        box.enter("started")

    def _boot(self, box: Box) -> None:
        uid = _BUBBLEWRAP.uid_for(box.id)
        shown = {box.image / name: Path("/opt", name) for name in sorted(os.listdir(box.image))}
        shown |= {DAEMON: Path("/opt/daytona_daemon.py")} | {path: path for path in self.readable}
        wall = _BUBBLEWRAP.arguments(
            box.directory, uid=uid, shown=shown, python=sys.executable, memory_bytes=_MEMORY_BYTES
        )
        with contextlib.ExitStack() as theirs:
            life_end, box.life = os.pipe()
            theirs.callback(os.close, life_end)
            listener = theirs.enter_context(socket.socket(socket.AF_UNIX))
            box.address = f"{self._sockets}/{uuid.uuid4().hex}"
            listener.bind(box.address)
            listener.listen()
            config = {"listen": listener.fileno(), "life": life_end, "uid": uid}
            box.process = subprocess.Popen(
                [*wall, sys.executable, "-I", "-S", "/opt/daytona_daemon.py", json.dumps(config)],
                env={
                    "HOME": _BUBBLEWRAP.HOME,
                    "LANG": "C.UTF-8",
                    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
                    "DAYTONA_SANDBOX_ID": box.id,
                    **box.asked.get("env", {}),
                },
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno(), life_end],
                start_new_session=True,
            )

    async def _end(self, box: Box) -> None:
        """Kills whatever runs in it."""
        process, box.process = box.process, None
        if process is not None:
            os.close(box.life)
            await asyncio.to_thread(process.wait, _PATIENCE_SECONDS)

    async def _stop(self, box: Box) -> None:
        box.desired = "stopped"

        async def stopped(box: Box) -> None:
            await self._end(box)
            box.enter("stopped")

        await self._change(box, "stop", "stopping", stopped)

    async def _destroy(self, box: Box) -> None:
        await self._end(box)
        box.enter("destroyed")
        await asyncio.to_thread(shutil.rmtree, box.directory, ignore_errors=True)

    async def _mind_intervals(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for box in self.existing():
                stop, archive, delete = (
                    box.intervals[name] for name in ("autoStopInterval", "autoArchiveInterval", "autoDeleteInterval")
                )
                unchanged = time.time() - box.changed_at
                if box.state == "started" and stop and time.time() - box.used_at > stop * self.minute:
                    await self._stop(box)
                elif box.state in ("stopped", "archived") and delete >= 0 and unchanged > delete * self.minute:
                    await self._destroy(box)
                elif box.state == "stopped" and archive and unchanged > archive * self.minute:
                    box.desired = "archived"
                    box.enter("archived")

    # --- the toolbox -------------------------------------------------------------------------------------------------

    async def _toolbox(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        values = self._fields(operation, body, *_FIELDS.get(operation, (set(), set())))
        values |= {name: value for name, value in request.match_info.items() if name != "box"}
        return await self._ask(request, operation, values)

    async def _upload(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        files: list[tuple[str, str]] = []
        path = ""
        async for part in await request.multipart():
            assert isinstance(part, BodyPartReader)
            content = bytes(await part.read())
            if (part.name or "").endswith(".path"):
                path = content.decode()
            else:
                files.append((path, base64.b64encode(content).decode()))
            request[_UPLOADED] = request.get(_UPLOADED, b"") + content
        return await self._ask(request, operation, {"files": files})

    async def _ask(self, request: web.Request, operation: str, values: dict[str, Any]) -> web.Response:
        box = self._find(request)
        if box.state != "started":
            raise Refused(400, "no IP address found. Is the Sandbox started?")
        box.used_at = time.time()
        try:
            reader, writer = await asyncio.open_unix_connection(box.address, limit=64 << 20)
            writer.write(json.dumps({"do": operation, "with": values}).encode() + b"\n")
            line = await reader.readline()
            writer.close()
        except (ConnectionError, FileNotFoundError):
            line = b""
        if not line:
            raise Refused(502, "the sandbox does not answer")
        answer = json.loads(line)
        if answer["status"] >= 400:
            raise Refused(answer["status"], answer["body"])
        if answer["body"] is None:
            return web.Response(status=answer["status"])
        return web.json_response(answer["body"], status=answer["status"])

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def _empty_image(self) -> Path:
        image = Path(tempfile.mkdtemp(dir=self.root, prefix="image-"))
        image.chmod(0o755)
        return image

    def _register(self, name: str, image: Path, asked: dict[str, Any]) -> None:
        now = _time(time.time())
        self.images[name] = image
        self.snapshots[name] = {
            "id": str(uuid.uuid4()), "general": False, "name": name, "state": "active", "size": 0.1, "entrypoint": None,
            "cpu": asked.get("cpu", 1), "gpu": 0, "mem": asked.get("memory", 1), "disk": asked.get("disk", 3),
            "errorReason": None, "createdAt": now, "updatedAt": now, "lastUsedAt": None, "sourceSandboxId": None,
        }  # fmt: skip

    def _snapshot(self, request: web.Request) -> dict[str, Any]:
        wanted = request.match_info["name"]
        for snapshot in self.snapshots.values():
            if wanted in (snapshot["id"], snapshot["name"]):
                return snapshot
        raise Refused(404, f"Snapshot with ID or name {wanted} not found")

    async def _snapshot_get(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        return web.json_response(self._snapshot(request))

    async def _snapshot_list(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        items = list(self.snapshots.values())
        page, limit = int(request.query.get("page", "1")), min(self.page, int(request.query.get("limit", "100")))
        pages = max(1, -(-len(items) // limit))
        shown = items[(page - 1) * limit : page * limit]
        return web.json_response({"items": shown, "total": len(items), "page": page, "totalPages": pages})

    async def _snapshot_delete(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        """Its name is taken until it is really gone, which is always later."""
        snapshot = self._snapshot(request)
        snapshot["state"] = "removing"

        def gone() -> None:
            if self.snapshots.get(snapshot["name"]) is snapshot:
                del self.snapshots[snapshot["name"]], self.images[snapshot["name"]]

        asyncio.get_running_loop().call_later(self.seconds["remove"], gone)
        return web.Response(status=200)

    async def _snapshot_activate(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        snapshot = self._snapshot(request)
        if snapshot["state"] == "active":
            raise Refused(400, f"Snapshot {snapshot['id']} is already active")
        if snapshot["state"] != "inactive":
            raise Refused(400, f"Snapshot {snapshot['id']} cannot be activated - it is in {snapshot['state']} state")
        snapshot["state"] = "pending"
        asyncio.get_running_loop().call_later(self.seconds["activate"], snapshot.update, {"state": "active"})
        return web.json_response(snapshot)

    async def _snapshot_create(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        asked = self._fields(operation, body, {"name", "buildInfo"}, {"cpu", "memory", "disk", "regionId"})
        if asked["name"] in self.snapshots:
            raise Refused(409, f"Snapshot with name {asked['name']} already exists")
        image = self._empty_image()
        self._register(asked["name"], image, asked)
        snapshot = self.snapshots[asked["name"]]
        try:
            log = await asyncio.to_thread(build, asked["buildInfo"]["dockerfileContent"], image)
        except ValueError as error:
            snapshot |= {"state": "build_failed", "errorReason": str(error)}
            log = str(error)
        self.build_logs = log
        if snapshot["state"] == "active" and self.seconds["bake"]:
            snapshot["state"] = "building"
            asyncio.get_running_loop().call_later(self.seconds["bake"], snapshot.update, {"state": "active"})
        return web.json_response(snapshot)

    build_logs = ""

    async def _snapshot_logs_url(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        name = self._snapshot(request)["name"]
        return web.json_response({"url": f"http://127.0.0.1:{self._port}/api/build-logs/{name}"})

    async def _snapshot_logs(self, request: web.Request, operation: str, body: bytes) -> web.Response:
        return web.Response(text=self.build_logs)


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"statusCode": status, "message": message, "error": "error"}, status=status)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
