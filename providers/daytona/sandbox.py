"""The Daytona provider: a Daytona sandbox for each session, named after it, from the snapshot that `bake.py` bakes.

Daytona stops it when nobody has used it for a while, archives it later, and keeps its disk until `release`; a sweep
renews it while a runner works. The name is the lock: of two hosts that create it at once, one gets a 409 and finds the
other's.

Both halves of the seam are here, the provider and its sandbox: what one makes the other must find.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import engineio  # type: ignore[import-untyped]
from daytona import (
    AsyncDaytona,
    AsyncSandbox,
    CreateSandboxFromSnapshotParams,
    DaytonaBadRequestError,
    DaytonaConfig,
    DaytonaConflictError,
    DaytonaError,
    DaytonaForbiddenError,
    DaytonaInternalServerError,
    DaytonaNotFoundError,
    FileUpload,
    ListSandboxesQuery,
    SessionExecuteRequest,
    VolumeMount,
)

import image
from _shared.errors import LaunchFailed
from _shared.provider import Launch, SandboxInfo, Started, read_ready
from _shared.settings import Settings, load
from daytona_errors import PASSING, activate, mapped, said, snapshot_state
from daytona_settings import DaytonaSettings

ENVIRONMENT_LABEL, SESSION_LABEL = "sandboxes-environment", "sandboxes-session"
RUNNER_SESSION = "runner-"  # how the names of the toolbox's sessions begin that hold a runner
AUTOSTOP_MINUTES = 5  # at least: what a sweep renews each minute must outlast several sweeps
ORPHAN_MINUTES = 24 * 60  # on top of the retention, Daytona deletes by itself what no host is left to release
CHANGE_SECONDS = 80.0  # for a change of state; below the dispatcher's launch budget
CALL_SECONDS = 15
FORGET_SECONDS = 5
POLL_SECONDS = 0.25
INPUT_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # a command is started before its input can be written to
LOGS_MISSED = 20  # polls of the log in a row that may fail

_BROKEN = frozenset({"error", "build_failed"})
_ASLEEP = frozenset({"stopped", "paused", "archiving", "archived"})
_GONE = frozenset({"destroying", "destroyed"})
_UNDER_WAY = frozenset({"pending", "building", "pulling", "snapshotting"})  # of a snapshot


SETTINGS = (DaytonaSettings,)  # this folder's own: what is wrong with them is told with the rest


def open_daytona(own: DaytonaSettings) -> AsyncDaytona:
    """The vendor's client."""
    # The library of its event stream would take Ctrl-C over from this process, and cancel every task.
    engineio.async_client.async_signal_handler_set = True
    return AsyncDaytona(DaytonaConfig(api_key=own.api_key, api_url=own.api_url, target=own.target))


def open_provider(environ: Mapping[str, str], settings: Settings) -> DaytonaProvider:
    """The provider as the environment describes it. Raises `SettingsError`."""
    own = load(DaytonaSettings, environ)
    api = urlsplit(settings.base_url).hostname or ""
    return DaytonaProvider(
        open_daytona(own),
        environment_id=settings.environment_id,
        snapshot=own.snapshot or image.name(own.cpu, own.memory_gib, own.disk_gib),
        keep_warm_seconds=settings.keep_warm_seconds,
        retention_seconds=settings.retention_seconds,
        archive_minutes=own.archive_minutes,
        allowed_hosts=None if "*" in own.allowed_hosts else sorted({*own.allowed_hosts, api}),
        volumes=own.volumes or (),
    )


class DaytonaProvider:
    """The sandboxes of one environment, told apart by a label."""

    name = "daytona"

    def __init__(
        self,
        daytona: AsyncDaytona,
        *,
        environment_id: str,
        snapshot: str,
        keep_warm_seconds: float = 300.0,
        retention_seconds: float = 7 * 86400.0,
        archive_minutes: int = 24 * 60,
        allowed_hosts: Sequence[str] | None = None,
        volumes: Sequence[tuple[str, str]] = (),
        runner: str = image.RUNNER,
    ) -> None:
        self._daytona = daytona
        self._environment_id = environment_id
        self._snapshot = snapshot
        self._autostop_minutes = max(AUTOSTOP_MINUTES, math.ceil(keep_warm_seconds / 60))
        self._delete_minutes = math.ceil(retention_seconds / 60) + ORPHAN_MINUTES
        self._archive_minutes = archive_minutes
        self._domains = ",".join(allowed_hosts) if allowed_hosts else None
        self._volumes = list(volumes)
        self._runner = runner

    async def acquire(self, session_id: str) -> DaytonaSandbox:
        """The session's sandbox: found, started or created, and it has run a command."""
        async with mapped():
            sandbox, created = await self._find_or_create(session_id)
            if sandbox.labels.get(ENVIRONMENT_LABEL) != self._environment_id:
                raise LaunchFailed("Daytona has a sandbox of this name that is not this environment's", retriable=False)
            await _bring_up(sandbox)
            # Not from the working directory, which the agent may have shut: that is undone here.
            look = f"chmod u+rwx {image.WORKSPACE}; test -r {self._runner}"
            answer = await sandbox.process.exec(look, cwd="/", timeout=CALL_SECONDS)
            if answer.exit_code != 0:
                reason = (
                    f"the sandbox has no {self._runner}: DAYTONA_SNAPSHOT names a snapshot that bake.py did not bake"
                )
                raise LaunchFailed(reason, retriable=False)
            return DaytonaSandbox(sandbox, created, self._runner)

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        """Puts off Daytona's auto-stop, which counts from the last activity."""
        async with mapped():
            sandbox = await self._daytona.get(sandbox_id, CALL_SECONDS)
            if (minutes := math.ceil(seconds / 60)) > (sandbox.auto_stop_interval or math.inf):
                await sandbox.set_autostop_interval(minutes, CALL_SECONDS)
            await sandbox.refresh_activity(CALL_SECONDS)

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        """Those with the environment's label."""
        async with mapped():
            query = ListSandboxesQuery(labels={ENVIRONMENT_LABEL: self._environment_id}, limit=100)
            async for sandbox in self._daytona.list(query, CALL_SECONDS):
                if _state(sandbox) not in _GONE:
                    yield SandboxInfo(
                        session_id=sandbox.labels[SESSION_LABEL],
                        sandbox_id=sandbox.id,
                        created_at=_seconds(sandbox.created_at),
                        last_used_at=_seconds(sandbox.last_activity_at or sandbox.updated_at),
                        running=_state(sandbox) not in _ASLEEP | _BROKEN,
                    )

    async def release(self, sandbox_id: str) -> None:
        """Deletes the sandbox with its disk."""
        async with mapped():
            with contextlib.suppress(DaytonaNotFoundError):
                sandbox = await self._daytona.get(sandbox_id, CALL_SECONDS)
                await sandbox.delete(CHANGE_SECONDS, wait=True)

    async def close(self) -> None:
        """Closes the connections. The sandboxes go on."""
        await self._daytona.close()  # type: ignore[no-untyped-call]

    async def _find_or_create(self, session_id: str) -> tuple[AsyncSandbox, bool]:
        with contextlib.suppress(DaytonaNotFoundError):
            return await self._daytona.get(session_id, CALL_SECONDS), False
        params = CreateSandboxFromSnapshotParams(
            name=session_id,
            snapshot=self._snapshot,
            labels={ENVIRONMENT_LABEL: self._environment_id, SESSION_LABEL: session_id},
            public=False,
            auto_stop_interval=self._autostop_minutes,
            auto_archive_interval=self._archive_minutes,
            auto_delete_interval=self._delete_minutes,
            domain_allow_list=self._domains,
            volumes=[VolumeMount(volume_id=name, mount_path=path) for name, path in self._volumes],
        )
        try:
            return await self._daytona.create(params, timeout=CHANGE_SECONDS), True
        except DaytonaBadRequestError as error:
            if (state := snapshot_state(error)) in _UNDER_WAY:
                raise LaunchFailed(f"the snapshot {self._snapshot} is {state}", retriable=True) from error
            if state == "inactive":
                raise await self._activated() from error
            hint = f"; bake it with `python bake.py`, it is {self._snapshot}" if "Snapshot" in error.message else ""
            raise LaunchFailed(f"Daytona refuses to create a sandbox: {said(error)}{hint}", retriable=False) from error
        except DaytonaConflictError:  # another host was faster
            return await self._daytona.get(session_id, CALL_SECONDS), False
        except DaytonaError as error:
            if type(error) is not DaytonaError or error.status_code is not None:
                raise
            # It exists, and did not start: what now, its state decides.
            return await self._daytona.get(session_id, CALL_SECONDS), True

    async def _activated(self) -> LaunchFailed:
        """What to say of a launch whose snapshot was inactive: Daytona puts one away that was not used for long."""
        try:
            await activate(self._daytona, self._snapshot)
        except DaytonaForbiddenError:
            cure = "run `python bake.py` with a key that may write snapshots"
            return LaunchFailed(f"the snapshot {self._snapshot} is inactive: {cure}", retriable=False)
        except DaytonaBadRequestError:  # another launch was faster, or it has become inactive just now
            pass
        return LaunchFailed(f"the snapshot {self._snapshot} was inactive and is being activated", retriable=True)


class DaytonaSandbox:
    """One session's sandbox."""

    def __init__(self, sandbox: AsyncSandbox, created: bool, runner: str) -> None:
        self.id: str = sandbox.id
        self.created = created
        self._sandbox = sandbox
        self._runner = runner

    async def start(self, launch: Launch) -> Started:
        """Starts the runner in a session of the toolbox, and writes the job to its input.

        The command is all that Daytona keeps of a start: the job goes over the input's endpoint into a pipe, and
        `suppress_input_echo` keeps it out of the log on the sandbox's disk (R11)."""
        process = self._sandbox.process
        async with mapped():
            await self._put(launch.files)
            await self._forget_ended()
            session = f"{RUNNER_SESSION}{time.time_ns()}"
            async with (
                contextlib.AsyncExitStack() as unless_told
            ):  # a runner that waits for its job would wait for ever
                unless_told.push_async_callback(self._forget, session)
                await process.create_session(session, CALL_SECONDS)
                request = SessionExecuteRequest(
                    command=f"python3 -I {self._runner} 2>&1", run_async=True, suppress_input_echo=True
                )
                command = (await process.execute_session_command(session, request, CALL_SECONDS)).cmd_id
                await self._send(session, command, launch.stdin.decode())
                unless_told.pop_all()
            return await read_ready(self._lines(session, command))

    async def _forget(self, session: str) -> None:
        """Ends what runs in a session of the toolbox. A launch that is out of time waits no longer than this for it."""
        with contextlib.suppress(DaytonaError):
            await self._sandbox.process.delete_session(session, FORGET_SECONDS)

    async def tail(self, lines: int) -> str:
        """The end of the latest runner's output."""
        async with mapped():
            sessions = sorted(await self._runners(), key=lambda session: session.session_id)
            if not sessions or not sessions[-1].commands:
                return ""
            session, command = sessions[-1].session_id, sessions[-1].commands[0].id
            logs = await self._sandbox.process.get_session_command_logs(session, command, CALL_SECONDS)
            return "\n".join((logs.stdout or "").splitlines()[-lines:]) if lines > 0 else ""

    async def _put(self, files: Mapping[str, bytes]) -> None:
        for path in map(PurePosixPath, files):
            if path.is_absolute() or ".." in path.parts:
                raise LaunchFailed(f"{path} is not below the working directory", retriable=False)
        if files:
            uploads = [FileUpload(content, f"{image.WORKSPACE}/{path}") for path, content in files.items()]
            await self._sandbox.fs.upload_files(uploads, timeout=int(CHANGE_SECONDS))

    async def _forget_ended(self) -> None:
        """Each session of the toolbox is a shell that stays; this also ends what an ended runner left in its group."""
        if self.created:
            return
        for session in await self._runners():
            if all(command.exit_code is not None for command in session.commands) and session.commands:
                with contextlib.suppress(DaytonaNotFoundError):  # another host's start was faster
                    await self._sandbox.process.delete_session(session.session_id, CALL_SECONDS)

    async def _runners(self) -> list[Any]:
        sessions = await self._sandbox.process.list_sessions(CALL_SECONDS)
        return [session for session in sessions if session.session_id.startswith(RUNNER_SESSION)]

    async def _send(self, session: str, command: str, job: str) -> None:
        for pause in INPUT_PAUSES:
            with contextlib.suppress(DaytonaInternalServerError):
                return await self._sandbox.process.send_session_command_input(session, command, job, CALL_SECONDS)
            await asyncio.sleep(pause)
        return await self._sandbox.process.send_session_command_input(session, command, job, CALL_SECONDS)

    async def _lines(self, session: str, command: str) -> AsyncIterator[bytes]:
        """The runner's output, asked for again and again: unlike a stream, that cannot end without anybody noticing."""
        process = self._sandbox.process
        given = missed = 0
        while True:
            try:
                ended = (await process.get_session_command(session, command, CALL_SECONDS)).exit_code is not None
                logs = await process.get_session_command_logs(session, command, CALL_SECONDS)
                missed = 0
            except PASSING:
                missed += 1
                if missed > LOGS_MISSED:
                    raise
            else:
                lines = (logs.stdout or "").splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n") or ended]
                for line in whole[given:]:
                    yield line.encode()
                given = len(whole)
                if ended:
                    return
            await asyncio.sleep(POLL_SECONDS)


async def _bring_up(sandbox: AsyncSandbox) -> None:
    """Until it is started, from whatever state it is in."""
    try:
        if _state(sandbox) == "stopping":
            await sandbox.wait_for_sandbox_stop(CHANGE_SECONDS)
        if _state(sandbox) in _ASLEEP:
            await sandbox.start(CHANGE_SECONDS)
        elif _state(sandbox) in _BROKEN and sandbox.recoverable:
            await sandbox.recover(CHANGE_SECONDS)
        elif _state(sandbox) in _BROKEN:
            await sandbox.delete(CHANGE_SECONDS, wait=True)
            raise LaunchFailed("the sandbox was broken and is made anew; its files are lost", retriable=True)
        else:
            await sandbox.wait_for_sandbox_start(CHANGE_SECONDS)
    except DaytonaBadRequestError as error:
        raise LaunchFailed(f"Daytona refuses to start the sandbox: {said(error)}", retriable=True) from error
    except DaytonaError as error:
        if _state(sandbox) not in _BROKEN:
            raise
        raise LaunchFailed("Daytona could not start the sandbox", retriable=True) from error


def _state(sandbox: AsyncSandbox) -> str:
    return sandbox.state.value if sandbox.state else "unknown"


def _seconds(moment: str | None) -> float:
    return datetime.fromisoformat(moment).timestamp() if moment else time.time()
