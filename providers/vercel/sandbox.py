"""The Vercel provider: one named, persistent Vercel Sandbox per session.

Names are unique in a project, so the name is the mapping from session to sandbox and the lock on making it. A store,
where there is one, keeps instances from doing the same work at once; it is asked only when there is something to make.

Long, because Vercel ends, expires and snapshots sandboxes by itself: finding, making, extending and ending one stand
side by side here, each with what another instance or Vercel may have done meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, STDOUT

import anyio
from vercel.sandbox import (
    NetworkPolicy,
    Process,
    ProcessSignal,
    Sandbox,
    SandboxApiError,
    SandboxClient,
    SandboxQueryByName,
    SandboxResources,
    SandboxServiceOptions,
    SandboxStatus,
    SnapshotExpiration,
    SnapshotRetention,
    SnapshotSource,
    TagFilter,
)

import image
from _shared.errors import LaunchFailed
from _shared.log import line
from _shared.provider import Launch, SandboxInfo, Started, read_ready
from _shared.session_store import SessionStore
from _shared.settings import Settings, load
from firewall import Firewall
from store import StoreSettings, UpstashSessionStore, lease, open_store
from vercel_errors import ERRORS, STOPPING, but_for, creating, mapped
from vercel_settings import VercelSettings

SETTINGS = (VercelSettings, StoreSettings)  # this folder's own: what is wrong with them is told with the rest

_log = logging.getLogger(__name__)

PREFIX = "cma-"
PAUSE_SECONDS = 0.3  # before it asks again whether another instance has made a sandbox
CALLS_AT_ONCE = 10
STOP_SECONDS = 30.0  # how long a launch waits for a stop of ours, with its snapshot; the next attempt goes on
STOP_POLL_SECONDS = 0.5
TAIL_SECONDS = 3.0  # the log of a running process has no end
HAND_OVER_SECONDS = 150.0  # before the plan's limit: twice the time that a runner needs to leave
FAILURES_SECONDS = 600.0
FAILURES = 25  # about two launches' attempts
_DAY_SECONDS = 86400.0
LONGEST_KEPT_SECONDS = 3650 * _DAY_SECONDS  # Vercel's limit for a snapshot
_LOG_CHARACTERS = 500
_KILL_SECONDS = 5.0
_SETPRIV = "/usr/bin/setpriv"
_AS_AGENT = ["--reuid", image.AGENT, "--regid", image.AGENT, "--init-groups", "--no-new-privs", "--"]
_RUNNING = frozenset({SandboxStatus.PENDING, SandboxStatus.RUNNING})
_STOPPING = frozenset({SandboxStatus.STOPPING, SandboxStatus.SNAPSHOTTING})


def open_provider(environ: Mapping[str, str], settings: Settings, store: SessionStore | None = None) -> VercelProvider:
    """The provider as the environment describes it, with the environment's store unless one is given. Raises
    `SettingsError`. Vercel's credentials are looked up by its SDK at each call."""
    own = load(VercelSettings, environ)
    client = SandboxClient.create(options=SandboxServiceOptions(base_url=own.api_url))
    return VercelProvider(client, settings, own, store=store or open_store(environ, settings.environment_id))


class VercelProvider:
    """The sandboxes of one environment in one Vercel project."""

    name = "vercel"

    def __init__(
        self,
        client: SandboxClient,
        settings: Settings,
        own: VercelSettings,
        *,
        store: SessionStore | None = None,
        wanted: image.Image | None = None,
        program: str | None = None,
    ) -> None:
        self._client = client
        self._settings = settings
        self._own = own
        self.firewall = Firewall(settings, own)
        self._store = store
        self._image = wanted or image.load(Path(__file__).resolve().parent)
        self._program = program
        self._hold_seconds = min(max(own.sandbox_seconds, settings.keep_warm_seconds), _DAY_SECONDS)  # above any plan's

    async def acquire(self, session_id: str) -> VercelSandbox:
        """The session's sandbox, running, prepared, and with time to work."""
        name = self._name(session_id)
        with mapped():
            await self._refuse_after_failures(name)
            sandbox, created = await self._ready(name), False
            if sandbox is None:
                async with self._alone(name):
                    sandbox, created = await self._make(name, session_id)
        return VercelSandbox(self, sandbox, created)

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        """Extends the sandbox's time. Where the plan allows no more, its runner is told to hand over in time."""
        with mapped():
            sandbox = await self._find(sandbox_id)
            if sandbox is None or sandbox.status not in _RUNNING:
                return
            has_time = await self._extend(sandbox, max(seconds, self._hold_seconds))
            if not has_time and _left(sandbox) < HAND_OVER_SECONDS:
                await self._hand_over(sandbox)

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        """Those with our prefix and this environment's tag."""
        tag = TagFilter(key="environment", value=self._settings.environment_id)
        ours = SandboxQueryByName(name_prefix=PREFIX, tag=tag)
        with mapped():
            found = [sandbox async for sandbox in self._client.query_sandboxes(query=ours)]
        for sandbox in found:
            if session_id := (sandbox.tags or {}).get("session"):
                created = (sandbox.created_at or 0) / 1000
                used = (sandbox.status_updated_at or sandbox.updated_at or 0) / 1000
                yield SandboxInfo(session_id, sandbox.name, created, used, sandbox.status in _RUNNING)

    async def release(self, sandbox_id: str) -> None:
        """Deletes the sandbox and its disk."""
        with mapped():
            if sandbox := await self._find(sandbox_id):
                with but_for(404):
                    await sandbox.destroy(delete_orphan_snapshots=True)

    async def close(self) -> None:
        """Closes the connections. The sandboxes go on."""
        await self._client.aclose()
        if isinstance(self._store, UpstashSessionStore):
            await self._store.close()

    # --- making one --------------------------------------------------------------------------------------------------

    def _name(self, session_id: str) -> str:
        """One for each session of each environment, of characters that any naming rule allows."""
        identity = f"{self._settings.environment_id}/{session_id}".encode()
        return PREFIX + hashlib.sha256(identity).hexdigest()[:32]

    async def _ready(self, name: str) -> Sandbox | None:
        """The sandbox if it only needs to be resumed."""
        with but_for(404, 410):
            sandbox = await self._client.resume_sandbox(name=name)
            sandbox = await self._with_time(sandbox)
            if await self._is_prepared(sandbox):
                await self.firewall.close_off(sandbox)
                return sandbox
        return None

    async def _make(self, name: str, session_id: str) -> tuple[Sandbox, bool]:
        """Creates the sandbox, or finds that another instance has, and prepares it."""
        sandbox = await self._resume(name)
        created = sandbox is None
        if sandbox is None:
            try:
                sandbox = await self._create(name, session_id)
            except SandboxApiError as error:
                if error.status_code != 409:
                    raise
                sandbox, created = await self._client.resume_sandbox(name=name), False  # somebody was faster
        sandbox = await self._with_time(sandbox)
        if not await self._is_prepared(sandbox):
            await self._prepare(sandbox)
        await self.firewall.close_off(sandbox)
        return sandbox, created

    async def _resume(self, name: str) -> Sandbox | None:
        try:
            return await self._client.resume_sandbox(name=name)
        except SandboxApiError as error:
            if error.status_code == 410 and error.code == "snapshot_not_found":
                # Its disk has expired, and with it the session's files: the name is all that is left.
                _log.warning(line("expired", provider=self.name, sandbox=name, reason="its snapshot is gone"))
                await self.release(name)
            elif error.status_code != 404:
                raise
        return None

    async def _create(self, name: str, session_id: str) -> Sandbox:
        kept = min(self._settings.retention_seconds + _DAY_SECONDS, LONGEST_KEPT_SECONDS)  # the sweep deletes first
        snapshot = self._own.snapshot_id
        with creating(snapshot):
            return await self._client.create_sandbox(
                name=name,
                source=SnapshotSource(snapshot_id=snapshot) if snapshot else None,
                image=None if snapshot else self._own.image,
                persistent=True,
                tags={"environment": self._settings.environment_id, "session": session_id},
                execution_time_limit=timedelta(seconds=self._hold_seconds),
                resources=SandboxResources(vcpus=self._own.vcpus),
                # Open until the SDK is installed.
                network_policy=self.firewall.policy() if snapshot else NetworkPolicy.allow_all(),
                snapshot_expiration=SnapshotExpiration(timedelta(seconds=kept)),
                snapshot_retention=SnapshotRetention(count=1),
            )

    async def _is_prepared(self, sandbox: Sandbox) -> bool:
        """Proves that it can exec, too."""
        one, other = self._image.marks
        done = await sandbox.run_process("test", ["-e", one, "-a", "-e", other], capture_output=True)
        return done.returncode == 0

    async def _prepare(self, sandbox: Sandbox) -> None:
        """Installs what a runner needs, with the network open and nothing of the agent's alive."""
        began = time.monotonic()
        _log.info(
            line("prepare", provider=self.name, sandbox=sandbox.name, reason="no snapshot, or one of another version")
        )
        await sandbox.run_process("pkill", ["-KILL", "-u", image.AGENT], sudo=True, capture_output=True)
        await sandbox.update(network_policy=NetworkPolicy.allow_all())
        await install(sandbox, self._image)
        ms = round((time.monotonic() - began) * 1000)
        _log.info(line("prepared", provider=self.name, sandbox=sandbox.name, ms=ms))

    async def _with_time(self, sandbox: Sandbox) -> Sandbox:
        """Gives it the time for a launch and the first sweep; one that the plan gives no more is started anew."""
        if await self._extend(sandbox, self._hold_seconds):
            return sandbox
        if _left(sandbox) < min(HAND_OVER_SECONDS, self._hold_seconds):
            await self._hand_over(sandbox)
            await _stop(sandbox)
            sandbox = await self._client.resume_sandbox(name=sandbox.name)
        return sandbox

    async def _extend(self, sandbox: Sandbox, seconds: float) -> bool:
        """Whether it has `seconds` left now."""
        if (missing := seconds - _left(sandbox)) <= 1:
            return True
        with but_for(400, 402, 403, 422):
            await sandbox.extend_execution_time_limit(timedelta(seconds=missing + 1))
            return True
        return False

    async def _hand_over(self, sandbox: Sandbox) -> None:
        """Tells the runners to leave."""
        for process in await sandbox.query_processes():
            if process.returncode is None:
                _log.info(line("hand_over", provider=self.name, sandbox=sandbox.name, reason="its time is up"))
                with but_for(404, 410):
                    await process.send_signal(ProcessSignal.SIGTERM)

    async def _find(self, name: str) -> Sandbox | None:
        with but_for(404):
            return await self._client.get_sandbox(name=name)
        return None

    # --- ending one --------------------------------------------------------------------------------------------------

    async def tidy(self) -> None:
        """Stops those that had no runner for SANDBOX_KEEP_WARM_SECONDS. A sweep gives it little time: it looks in
        another order each time, so that a few that hang do not keep it from the others."""
        few = asyncio.Semaphore(CALLS_AT_ONCE)

        async def look(name: str) -> None:
            async with few:
                try:
                    with mapped():
                        await self._stop_if_unused(name)
                except LaunchFailed as error:
                    _log.warning(line("stop", provider=self.name, sandbox=name, error=error, reason=str(error)))

        names = [info.sandbox_id async for info in self.sandboxes() if info.running]
        await asyncio.gather(*map(look, random.sample(names, len(names))))

    async def _stop_if_unused(self, name: str) -> None:
        """A launch and each renewal leave it `_hold_seconds`: what is missing of them, it was unused for."""
        sandbox = await self._find(name)
        if sandbox is None or sandbox.status not in _RUNNING:
            return
        if self._hold_seconds - _left(sandbox) <= self._settings.keep_warm_seconds:
            return
        with but_for(404, 410):
            if any(process.returncode is None for process in await sandbox.query_processes()):
                return
            await sandbox.stop()
        _log.info(line("stopped", provider=self.name, sandbox=name, reason="unused"))

    # --- between instances -------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """One instance at a time makes or mends a sandbox, where there is a store. One that is frozen meanwhile may get
        company; names still guard."""
        while True:
            async with lease(self._store, f"making:{name}") as is_ours:
                if is_ours:
                    yield
                    return
            await asyncio.sleep(PAUSE_SECONDS)

    async def _refuse_after_failures(self, name: str) -> None:
        if self._store is not None and int(await self._store.get(f"failures:{name}") or 0) >= FAILURES:
            minutes = round(FAILURES_SECONDS / 60)
            reason = f"no runner started in it {FAILURES} times within {minutes} minutes: it is left alone so long"
            raise LaunchFailed(reason, retriable=False)

    async def count_failure(self, name: str) -> None:
        if self._store is not None:
            await self._store.increment(f"failures:{name}", FAILURES_SECONDS)

    async def begin(self, sandbox: Sandbox) -> Process:
        """A runner that waits for its job."""
        arguments = self._image.arguments(program=self._program)
        return await sandbox.create_process(
            self._image.python,
            arguments,
            cwd="/",
            env=image.VARIABLES,
            sudo=True,
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
        )


class VercelSandbox:
    """One session's sandbox."""

    def __init__(self, provider: VercelProvider, sandbox: Sandbox, created: bool) -> None:
        self.id = sandbox.name
        self.created = created
        self._provider = provider
        self._sandbox = sandbox

    async def start(self, launch: Launch) -> Started:
        """Starts the runner detached, writes the job to its standard input, and reads what it says until it is
        ready."""
        try:
            with mapped():
                if launch.files:
                    await self._put(launch.files)
                process = await self._provider.begin(self._sandbox)
                try:
                    await self._tell(process, await self._provider.firewall.brief(self._sandbox, launch.stdin))
                    return await read_ready(self._lines(process))
                finally:
                    if process.stdout is not None:
                        await process.stdout.aclose()
        except LaunchFailed:
            await self._provider.count_failure(self.id)
            raise

    async def tail(self, lines: int) -> str:
        """The end of what the last runner has said. It resumes a sandbox that has stopped."""
        said: list[str] = []
        with mapped():
            runners = [each for each in await self._sandbox.query_processes() if each.name.startswith(image.ROOT)]
            if runners and (output := max(runners, key=lambda each: each.started_at).stdout) is not None:
                with anyio.move_on_after(TAIL_SECONDS):
                    while text := await output.readline():
                        said.append(text.rstrip("\n"))
        return "\n".join(said[-lines:])

    async def _put(self, files: Mapping[str, bytes]) -> None:
        """Writes files below the working directory, as the agent's user: nothing of the agent's leads elsewhere."""
        unpack = [*_AS_AGENT, "tar", "-x", "-f", "-", "-C", image.WORKSPACE]
        done = await self._sandbox.run_process(
            _SETPRIV, unpack, cwd="/", sudo=True, input=image.tar(files), capture_output=True
        )
        if done.returncode:
            raise LaunchFailed("the session's files could not be written", retriable=False)

    async def _tell(self, process: Process, stdin: bytes) -> None:
        """The job goes to standard input and nowhere else (R11). A runner that does not get it is not left waiting."""
        async with contextlib.AsyncExitStack() as unless_told:
            unless_told.push_async_callback(_kill, process)
            if process.stdin is not None:
                await process.stdin.send(stdin)
                await process.stdin.aclose()
            unless_told.pop_all()

    async def _lines(self, process: Process) -> AsyncIterator[bytes]:
        while process.stdout is not None and (text := await process.stdout.readline()):
            _log.info(line("runner", provider="vercel", sandbox=self.id, reason=text.strip()[:_LOG_CHARACTERS]))
            yield text.encode()


async def _kill(process: Process) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(_KILL_SECONDS), contextlib.suppress(*ERRORS):
        await process.kill()


async def _stop(sandbox: Sandbox) -> None:
    """Stops it and waits until it has stopped: nothing can resume it before. Raises `LaunchFailed`."""
    deadline = time.monotonic() + STOP_SECONDS
    await sandbox.stop()
    session = sandbox.current_session
    while session is not None and session.status in _STOPPING:
        if time.monotonic() > deadline:
            raise LaunchFailed(f"Vercel {STOPPING}", retriable=True)
        await asyncio.sleep(STOP_POLL_SECONDS)
        await session.refresh()


async def install(sandbox: Sandbox, wanted: image.Image) -> None:
    """Makes a sandbox ready for runners; the one step that needs the network. Raises `LaunchFailed`."""
    arguments = ["-c", image.SCRIPT, wanted.sdk, wanted.runner]
    done = await sandbox.run_process("bash", arguments, cwd="/", sudo=True, input=wanted.archive, capture_output=True)
    if done.returncode:
        words = (done.stderr or "").strip().rpartition("\n")[2][-_LOG_CHARACTERS:]
        raise LaunchFailed(f"what a runner needs could not be installed: {words}", retriable=True)


def _left(sandbox: Sandbox) -> float:
    """Seconds until the sandbox's time is up; 0 when it does not say."""
    session = sandbox.current_session
    began = (session.started_at or session.requested_at) if session else None
    if session is None or began is None or session.execution_time_limit is None:
        return 0.0
    return began / 1000 + session.execution_time_limit.total_seconds() - time.time()
