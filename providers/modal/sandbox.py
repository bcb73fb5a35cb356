"""The Modal provider: a sandbox is a Modal Sandbox named after its session, its files are a directory of one Volume.

The name is the lock: Modal lets one running sandbox of an app have it. The sandbox ends when no runner was in it for a
while (Modal's idle timeout, which a running command keeps off) and at the latest after its lifetime, which Modal cannot
prolong: `acquire` replaces one whose time is short, and `sandbox_init.py` lets a runner hand over before it is up. The
directory stays until `release`.

Both halves of the seam are here, the provider and its sandbox: what one makes the other must find.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import modal
import modal.exception

from _shared.errors import LaunchFailed, SettingsError
from _shared.provider import Launch, SandboxInfo, Started, read_ready
from _shared.settings import Settings, load
from image import INSIDE, sandbox_image
from modal_errors import mapped
from modal_settings import ModalSettings

APP = "sandboxes"  # the app's name at Modal: another one for each environment that you serve
VOLUME = "sandboxes-workspaces"
WORKSPACE = "/workspace"
HANDOVER_SECONDS = 120.0  # before the end of its lifetime a sandbox lets its runner hand over
RENEW_SECONDS = 1_800.0  # an idle sandbox that has less left than this, or a quarter of its lifetime, is replaced
SHORTEST_IDLE_SECONDS = 10  # between `acquire` and `start` no command runs, and Modal may end the sandbox
CREATE_SECONDS = 60.0
EXEC_SECONDS = 30.0
CALLS_AT_ONCE = 16
_ATTEMPTS = 4
_INIT = ("python", "-I", f"{INSIDE}/sandbox_init.py")
_NAME = re.compile(r"(?!ap-[a-zA-Z0-9]{22}$)[A-Za-z0-9_.-]{1,63}\Z")  # what Modal takes for a sandbox's name and a tag
_RUNNING = None  # what `poll` says of a sandbox that has not ended


SETTINGS = (ModalSettings,)  # this folder's own: what is wrong with them is told with the rest


def open_provider(
    environ: Mapping[str, str],
    settings: Settings,
    *,
    app: modal.App | None = None,
    image: modal.Image | None = None,
    client: modal.Client | None = None,
) -> ModalProvider:
    """The provider as the environment describes it; `app` and `image` are those of the function this runs in. Without
    them, on a machine of your own, the app is looked up or made, and the image built. Raises `SettingsError`."""
    if not _NAME.match(settings.environment_id):
        raise SettingsError("ANTHROPIC_ENVIRONMENT_ID is unusable: expected letters, digits, - and _")
    return ModalProvider(load(ModalSettings, environ), settings, app=app, image=image, client=client)


class ModalProvider:
    """The sandboxes of one environment in one Modal app."""

    name = "modal"

    def __init__(
        self,
        own: ModalSettings,
        settings: Settings,
        *,
        app: modal.App | None = None,
        image: modal.Image | None = None,
        client: modal.Client | None = None,
        runner: PurePosixPath | None = None,
        handover_seconds: float = HANDOVER_SECONDS,
        renew_seconds: float = RENEW_SECONDS,
    ) -> None:
        self._own = own
        self._settings = settings
        self._app = app
        self._image = image
        self._client = client
        self._runner = (str(runner),) if runner else ()
        self._handover_seconds = handover_seconds
        self._renew_seconds = min(renew_seconds, own.lifetime_seconds / 4)
        self._volume = modal.Volume.from_name(VOLUME, create_if_missing=True, version=2, client=client)
        self._sessions: dict[str, str] = {}  # of the sandboxes seen, by sandbox id: tags do not change
        self._last_used: dict[str, float] = {}  # of sessions that look unused and were looked at closely
        self._calls = asyncio.Semaphore(CALLS_AT_ONCE)
        self._opening: asyncio.Task[modal.App] | None = None

    async def acquire(self, session_id: str) -> ModalSandbox:
        """The session's sandbox, made if there is none, replaced if its time is short and no runner is in it."""
        if not _NAME.match(session_id):
            raise LaunchFailed("the session id cannot be the name of a sandbox", retriable=False)
        with mapped():
            app = await self._opened()
            for _ in range(_ATTEMPTS):
                found = await self._find(session_id)
                sandbox = found or await self._create(app, session_id)
                if sandbox and await self._holds(sandbox):
                    self._sessions[sandbox.object_id] = session_id
                    return ModalSandbox(sandbox, created=not found, runner=self._runner, secrets=self._secrets())
        raise LaunchFailed("the session's sandboxes end as soon as they are made", retriable=True)

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        """Nothing: a running runner keeps Modal's idle timeout off, and a lifetime cannot be prolonged."""

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        """The running sandboxes, then the sessions of which only files are left."""
        with mapped():
            app = await self._opened()
            tags = {"environment": self._settings.environment_id}
            listed = [each async for each in modal.Sandbox.list.aio(app_id=app.app_id, tags=tags, client=self._client)]
            sessions = await asyncio.gather(*map(self._session, listed))
            running = {session: each.object_id for session, each in zip(sessions, listed, strict=True) if session}
            self._sessions = {sandbox_id: session for session, sandbox_id in running.items()}
            for session, sandbox_id in running.items():
                yield SandboxInfo(session, sandbox_id, time.time(), time.time(), running=True)
            for entry in await self._listed(self._directory()):
                session = PurePosixPath(entry.path).name
                if session not in running:
                    yield SandboxInfo(session, session, entry.mtime, await self._used(session, entry), running=False)

    async def release(self, sandbox_id: str) -> None:
        """Terminates the sandbox and deletes the session's files. Takes the id of either."""
        with mapped():
            if sandbox_id.startswith("sb-"):
                sandbox = await self._by_id(sandbox_id)
                session = await self._session(sandbox) if sandbox else self._sessions.get(sandbox_id)
            else:
                session, sandbox = sandbox_id, await self._find(sandbox_id)
            if sandbox:
                await sandbox.terminate.aio(wait=True)
            self._sessions.pop(sandbox_id, None)
            self._last_used.pop(session or "", None)
            if session and _NAME.match(session):
                with contextlib.suppress(FileNotFoundError):
                    await self._volume.remove_file.aio(self._directory(session), recursive=True)

    # --- Modal's own objects -----------------------------------------------------------------------------------------

    async def _opened(self) -> modal.App:
        """The app, with its image built. Building takes minutes and is not given up with the launch that asked."""
        if self._app is not None and self._image is not None:
            return self._app
        if self._opening is None or (self._opening.done() and (self._opening.cancelled() or self._opening.exception())):
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> modal.App:
        app = self._app or await modal.App.lookup.aio(APP, create_if_missing=True, client=self._client)
        self._image = await (self._image or sandbox_image()).build.aio(app)
        self._app = app
        return app

    async def _find(self, session_id: str) -> modal.Sandbox | None:
        with contextlib.suppress(modal.exception.NotFoundError):
            return await modal.Sandbox.from_name.aio(APP, session_id, client=self._client)
        return None

    async def _by_id(self, sandbox_id: str) -> modal.Sandbox | None:
        with contextlib.suppress(modal.exception.NotFoundError):
            return await modal.Sandbox.from_id.aio(sandbox_id, client=self._client)
        return None

    async def _create(self, app: modal.App, session_id: str) -> modal.Sandbox | None:
        """A new sandbox, or None when somebody else made one meanwhile."""
        own, lifetime = self._own, int(self._own.lifetime_seconds)
        mount = self._volume.with_mount_options(sub_path=self._directory(session_id))
        async with asyncio.timeout(CREATE_SECONDS):
            with contextlib.suppress(modal.exception.AlreadyExistsError):
                return await modal.Sandbox.create.aio(
                    *_INIT,
                    "wait",
                    f"{lifetime - self._handover_seconds:g}",
                    app=app,
                    name=session_id,
                    tags={"environment": self._settings.environment_id, "session": session_id},
                    image=self._image,
                    volumes={WORKSPACE: mount},
                    workdir=WORKSPACE,
                    timeout=lifetime,
                    idle_timeout=max(int(self._settings.keep_warm_seconds), SHORTEST_IDLE_SECONDS),
                    cpu=own.cpu,
                    memory=(int(own.memory_mb.request), int(own.memory_mb.limit)),
                    gpu=own.gpu,
                    region=own.regions,
                    outbound_domain_allowlist=self._allowed(),
                    proxy=modal.Proxy.from_name(own.proxy, client=self._client) if own.proxy else None,
                    client=self._client,
                )
        return None

    async def _holds(self, sandbox: modal.Sandbox) -> bool:
        """Whether the sandbox runs commands and has time left. One that is short of it and idle is ended."""
        try:
            async with asyncio.timeout(EXEC_SECONDS):
                process = await sandbox.exec.aio(*_INIT, "hold", timeout=int(EXEC_SECONDS))
                answer = await process.stdout.read.aio()
                code = await process.wait.aio()
        except (modal.exception.NotFoundError, modal.exception.ConflictError):
            return False  # it ended meanwhile
        if code:
            if await sandbox.poll.aio() is _RUNNING:
                raise LaunchFailed("the sandbox does not run commands", retriable=True)
            return False
        state = json.loads(answer)
        if state["left"] > (0 if state["runs"] else self._renew_seconds):
            return True
        if state["runs"]:
            raise LaunchFailed("the sandbox's time is over and its runner hands over", retriable=True)
        await sandbox.terminate.aio(wait=True)
        return False

    async def _session(self, sandbox: modal.Sandbox) -> str | None:
        """The session of one of our sandboxes. Asked once: Modal's list does not say it."""
        if known := self._sessions.get(sandbox.object_id):
            return known
        async with self._calls:
            with contextlib.suppress(modal.exception.NotFoundError):
                return (await sandbox.get_tags.aio()).get("session")
        return None

    # --- files -------------------------------------------------------------------------------------------------------

    def _directory(self, *below: str) -> str:
        return str(PurePosixPath("/", self._settings.environment_id, *below))

    async def _listed(self, directory: str) -> list[Any]:
        with contextlib.suppress(modal.exception.NotFoundError, FileNotFoundError):
            return await self._volume.listdir.aio(directory)
        return []

    async def _used(self, session_id: str, entry: Any) -> float:
        """When the session's files were last used. Its directory's own time says that something was added or removed
        there; one that looks unused is looked at more closely, in the runner's journal of begun calls."""
        oldest = time.time() - self._settings.retention_seconds
        if entry.mtime >= oldest:
            return float(entry.mtime)
        if self._last_used.get(session_id, 0.0) < oldest:
            journal = await self._listed(self._directory(session_id, ".sandbox"))
            self._last_used[session_id] = float(max([entry.mtime, *(each.mtime for each in journal)]))
        return self._last_used[session_id]

    # --- settings ----------------------------------------------------------------------------------------------------

    def _allowed(self) -> Sequence[str] | None:
        """None: everything."""
        if "*" in self._own.allowed_hosts:
            return None
        return sorted({*self._own.allowed_hosts, urlsplit(self._settings.base_url).hostname or ""})

    def _secrets(self) -> list[modal.Secret]:
        return [modal.Secret.from_name(name, client=self._client) for name in self._own.tool_secrets or ()]

    async def close(self) -> None:
        """Nothing: the sandboxes are Modal's, and outlive this host."""


class ModalSandbox:
    """One session's sandbox."""

    def __init__(
        self, sandbox: modal.Sandbox, *, created: bool, runner: Sequence[str], secrets: Sequence[modal.Secret]
    ) -> None:
        self.id = sandbox.object_id
        self.created = created
        self._sandbox = sandbox
        self._runner = runner
        self._secrets = secrets

    async def start(self, launch: Launch) -> Started:
        """Writes the files, gives the job to a new runner's standard input, and reads what it says until it is ready.
        The runner goes on when nobody reads any more."""
        with mapped():
            if launch.files:
                await self._put(launch.files)
            process = await self._sandbox.exec.aio(*_INIT, "run", *self._runner, secrets=self._secrets, bufsize=1)
            process.stdin.write(launch.stdin)
            process.stdin.write_eof()
            await process.stdin.drain.aio()
            async with contextlib.aclosing(_lines(process.stdout)) as lines:
                return await read_ready(lines)

    async def tail(self, lines: int) -> str:
        """The end of the runners' log, while the sandbox runs."""
        with mapped():
            process = await self._sandbox.exec.aio("tail", "-n", str(lines), "/run/sandbox/runner.log")
            return (await process.stdout.read.aio()).rstrip("\n")

    async def _put(self, files: Mapping[str, bytes]) -> None:
        process = await self._sandbox.exec.aio(*_INIT, "put")
        process.stdin.write(json.dumps([(name, len(content)) for name, content in files.items()]) + "\n")
        for content in files.values():
            process.stdin.write(content)
            await process.stdin.drain.aio()
        process.stdin.write_eof()
        await process.stdin.drain.aio()
        if await process.wait.aio():
            raise LaunchFailed("the session's files could not be written", retriable=False)


async def _lines(stream: Any) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(aiter(stream)) as lines:
        async for line in lines:
            yield line.encode()
