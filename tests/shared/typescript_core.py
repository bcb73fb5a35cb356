"""The TypeScript core in the place of the Python core's classes: the same verbs, carried out in a Node process.

Each class here is called as the Python class whose name it has, by the same tests (`test_typescript_core.py`). What
the core asks of the outside goes through the tests' own doubles: requests through their `Detour`, launches through
their provider.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import subprocess
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2

from shared.errors import FetchRefused, JobRefused, LaunchFailed, SettingsError, WebhookRejected
from shared.handler import Reply
from shared.provider import Launch
from shared.webhook import WebhookEvent
from tests.shared.support import Detour, FakeProvider
from tools import typescript

CALL_SECONDS = 60.0
PROGRAM = Path(__file__).with_name("typescript_core.mts")
_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_ERRORS = {error.__name__: error for error in (SettingsError, WebhookRejected, JobRefused)}
_log = logging.getLogger("typescript")

Values = dict[str, Any]


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


class Core:
    """One Node process. `attach` says for whom it works now."""

    def __init__(self, folder: Path) -> None:
        argv = [str(typescript.node()), "--experimental-strip-types", "--no-warnings", str(PROGRAM)]
        self._process = subprocess.Popen(
            argv,
            cwd=folder,
            env=typescript.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._calls: dict[int, Future[Any]] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.detour = Detour()
        self.providers: dict[int, FakeProvider] = {}
        self.bodies: dict[int, AsyncIterable[bytes]] = {}
        self.fetcher: Any = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @contextlib.asynccontextmanager
    async def attached(self, detour: Detour) -> AsyncIterator[None]:
        """What it asks is answered in this loop, requests by `detour`."""
        self.detour = detour
        with self._lock:
            self._loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            with self._lock:
                self._loop = None
            self.providers.clear()
            self.bodies.clear()
            self.fetcher = None
            await detour.aclose()

    def new(self) -> int:
        """A name for an object over there."""
        return next(self._ids)

    def start(self, verb: str, **given: Any) -> Future[Any]:
        number, future = next(self._ids), Future[Any]()
        self._calls[number] = future
        self._write({"do": verb, "id": number, **given})
        return future

    def call(self, verb: str, **given: Any) -> Any:
        """For what asks nothing of the outside."""
        return self.start(verb, **given).result(CALL_SECONDS)

    async def ask(self, verb: str, **given: Any) -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(self.start(verb, **given)), CALL_SECONDS)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(CALL_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def _write(self, values: Values) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(f"{json.dumps(values, default=vars)}\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            said = json.loads(text)
            if "log" in said:
                _log.log(_LEVELS[said["log"]], "%s", said["line"])
            elif "ask" in said:
                with self._lock:  # a loop that ends is taken away first; what an ended test left over gets no answer
                    if self._loop is not None:
                        asyncio.run_coroutine_threadsafe(self._answer(said), self._loop)
            elif (failed := said.get("failed")) is not None:
                self._calls.pop(said["done"]).set_exception(_ERRORS.get(failed, RuntimeError)(said["text"]))
            else:
                self._calls.pop(said["done"]).set_result(said["value"])

    async def _answer(self, said: Values) -> None:
        answers: dict[str, Callable[[Values], Coroutine[Any, Any, Values]]] = {
            "fetch": self._fetch,
            "launch": self._launch,
            "chunk": self._chunk,
            "file": self._file,
        }
        self._write({"answer": said["id"], **await answers[said["ask"]](said)})

    async def _fetch(self, said: Values) -> Values:
        content = (said["body"] or "").encode()
        request = httpx2.Request(said["method"], said["url"], headers=said["headers"], content=content)
        try:
            response = await self.detour.handle_async_request(request)
        except httpx2.TransportError:
            return {"failed": True}
        headers = {name: value for name, value in response.headers.items() if name != "content-encoding"}
        return {"status": response.status_code, "headers": headers, "body": encoded(response.content)}

    async def _launch(self, said: Values) -> Values:
        job, provider = said["job"], self.providers[said["of"]]
        credential = "ANTHROPIC_WORK_SECRET" if job["isItemToken"] else "ANTHROPIC_ENVIRONMENT_KEY"
        stdin = {"ANTHROPIC_SESSION_ID": job["sessionId"], "ANTHROPIC_WORK_ID": job["workId"], credential: job["token"]}
        files = {path: base64.b64decode(content) for path, content in said["files"]}
        try:
            sandbox = await provider.acquire(job["sessionId"])
            started = await sandbox.start(Launch(stdin=json.dumps(stdin).encode(), files=files))
        except LaunchFailed as error:
            return {"failed": str(error), "retriable": error.retriable}
        except Exception as error:  # noqa: BLE001 - a bug of the provider's, as the core would meet it
            return {"bug": type(error).__name__, "text": str(error)}
        return {"sandbox": sandbox.id, "outcome": "ready" if started.outcome == "ready" else "served_already"}

    async def _chunk(self, said: Values) -> Values:
        chunk = await anext(aiter(self.bodies[said["of"]]), None)
        return {"chunk": None if chunk is None else encoded(chunk)}

    async def _file(self, said: Values) -> Values:
        try:
            return {"status": 200, "body": encoded(await self.fetcher.fetch(said["url"], 1 << 30))}
        except FetchRefused:
            return {"status": 404, "body": None}


def environ_of(settings: Any) -> dict[str, str]:
    """What `tests.shared.support.settings_for` was given."""
    return {
        "ANTHROPIC_ENVIRONMENT_ID": settings.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": settings.environment_key,
        "ANTHROPIC_BASE_URL": settings.base_url,
        "ALLOW_ENVIRONMENT_KEY_IN_SANDBOX": str(settings.allow_environment_key_in_sandbox),
        "SANDBOX_MAX_LIVE": str(settings.max_live),
        "SANDBOX_LAUNCH_CONCURRENCY": str(settings.launch_concurrency),
        "SANDBOX_STAGE_FILES": str(settings.stage_files),
    }


class Dispatcher:
    """What runs is what has been launched: this core's hosts are told when a runner ends, and count by themselves."""

    def __init__(
        self,
        core: Core,
        settings: Any,
        provider: Any,
        *,
        drain_seconds: float | None = None,
        launch_seconds: float | None = None,
        retry_pauses: Sequence[float] = (),
        stage_seconds: float | None = None,
    ) -> None:
        self._core, self.name = core, core.new()
        core.providers[self.name] = provider
        timing = {
            **({"drainMs": drain_seconds * 1000} if drain_seconds is not None else {}),
            **({"launchMs": launch_seconds * 1000} if launch_seconds is not None else {}),
            **({"firstPauseMs": retry_pauses[0] * 1000} if retry_pauses else {}),
        }
        core.call(
            "dispatcher",
            of=self.name,
            environ=environ_of(settings),
            live=[info.session_id for info in provider.infos if info.running],
            ownTools=list(settings.tool_names),
            timing=timing,
            **({"stageMs": stage_seconds * 1000} if stage_seconds is not None else {}),
        )

    def wake(self, _event: object = None) -> None:
        self._core.start("wake", of=self.name)

    def suspect(self, event: WebhookEvent) -> None:
        self._core.start("suspect", of=self.name, session=event.session_id)

    async def drain(self) -> None:
        await self._core.ask("drain", of=self.name)

    async def sweep(self) -> None:
        await self._core.ask("sweep", of=self.name)

    async def close(self, grace_seconds: float) -> None:
        """It has none: its platform ends it as it likes."""


class WorkItems(list[Any]):
    now: float | None = None


class Healer:
    def __init__(self, core: Core, settings: Any) -> None:
        self._core, self._name = core, core.new()
        tools = list(settings.tool_names)
        core.call("healer", of=self._name, environ=environ_of(settings), ownTools=tools)

    def hint(self, session_id: str) -> None:
        self._core.start("hint", of=self._name, session=session_id)

    async def list_work(self) -> WorkItems | None:
        found = await self._core.ask("listWork", of=self._name)
        if found is None:
            return None
        items = WorkItems(json.loads(json.dumps(found["items"]), object_hook=lambda values: SimpleNamespace(**values)))
        items.now = found.get("now")
        return items

    async def heal(self, items: WorkItems) -> int:
        healed: int = await self._core.ask("heal", of=self._name, list={"items": list(items), "now": items.now})
        return healed


class Verifier:
    def __init__(self, core: Core, keys: Sequence[str]) -> None:
        self.core, self.name = core, core.new()
        core.call("verifier", of=self.name, keys=list(keys))

    def verify(self, body: bytes, headers: Mapping[str, str]) -> WebhookEvent:
        try:
            event = self.core.call("verify", of=self.name, body=encoded(body), headers=carried(headers))
        except UnicodeEncodeError:
            raise WebhookRejected("HTTP carries no such header") from None
        return WebhookEvent(id=event["id"], type=event["type"], session_id=event["sessionId"])


def carried(headers: Mapping[str, str]) -> dict[str, str]:
    """As HTTP carries them: what it cannot carry no Worker ever sees."""
    for value in headers.values():
        if any(character in value for character in "\0\r\n"):
            raise WebhookRejected("HTTP carries no such header")
        value.encode("latin-1")
    return dict(headers)


async def handle(
    request: Any,
    *,
    verifier: Verifier,
    wake: Callable[[WebhookEvent], None],
    suspect: Callable[[WebhookEvent], None] | None = None,
) -> Reply:
    core, body = verifier.core, verifier.core.new()
    core.bodies[body] = request.body
    headers = carried(request.headers)
    said = await core.ask("handle", of=verifier.name, method=request.method, headers=headers, body=body)
    for events, tell in ((said["woken"], wake), (said["suspects"], suspect)):
        for event in events:
            if tell is not None:
                tell(WebhookEvent(id=event["id"], type=event["type"], session_id=event["sessionId"]))
    return Reply(said["status"], said["body"].encode(), said["headers"])
