"""The Docker provider: a sandbox is a container per session, and two named volumes that outlive it.

A container runs as long as its session has a runner and a while longer, by its own clock; the worker that made it may
come and go. What is true is what the Engine says: nothing is remembered here. The container's name is the lock (R10),
since the Engine gives a name to one container only.

Both halves of the seam are here, the provider and its sandbox: what one makes the other must find.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import containers
import egress
from _shared.errors import LaunchFailed, SettingsError
from _shared.log import line
from _shared.provider import Launch, SandboxInfo, Started, read_ready
from _shared.settings import Settings, load
from containers import Limits, Names
from docker_settings import DockerSettings
from engine import Engine, mapped, racing

SETTINGS = (DockerSettings,)  # this folder's own: what is wrong with them is told with the rest

_log = logging.getLogger(__name__)

_ENTER = [*containers.PYTHON, containers.ENTER]
GRACE_SECONDS = 30  # for a runner to hand over once it is told to; it takes up to 20 s
_ATTEMPTS = 10  # to find or make a container that others find, make and remove at the same time
_ATTEMPT_PAUSE_SECONDS = 0.2
_INSPECTIONS_AT_ONCE = 8
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")
_ENDED = ("created", "exited", "dead", "removing")  # of the Engine's states those in which nothing runs


def open_provider(environ: Mapping[str, str], settings: Settings) -> DockerProvider:
    """The provider as the environment describes it. Opens nothing: the Engine may be down now and up later. Raises
    `SettingsError`."""
    own = load(DockerSettings, environ)
    if not _ID.match(settings.environment_id):
        raise SettingsError("ANTHROPIC_ENVIRONMENT_ID is unusable: expected letters, digits, - and _")
    if own.runner == "ant" and (settings.tools or settings.tool_names):
        raise SettingsError(
            "DOCKER_RUNNER=ant cannot run custom tools: unset SANDBOX_TOOLS and SANDBOX_TOOL_NAMES, or it"
        )
    return DockerProvider(
        Engine(own.host),
        namespace=settings.environment_id,
        base_url=settings.base_url,
        image=own.image,
        runner=containers.RUNNERS[own.runner],
        runtime=own.runtime,
        limits=Limits(own.memory_mb, own.cpus, own.pids, own.file_mb, own.disk_mb),
        allowed_hosts=own.allowed_hosts,
        egress_network=own.egress_network,
        keep_warm_seconds=settings.keep_warm_seconds,
    )


class DockerProvider:
    """Sandboxes on one Engine; all of them belong to one environment."""

    name = "docker"

    def __init__(
        self,
        engine: Engine,
        *,
        namespace: str,
        base_url: str,
        image: str = "sandboxes-docker",
        runtime: str | None = None,
        limits: Limits | None = None,
        allowed_hosts: Sequence[str] = (),
        egress_network: str = "bridge",
        keep_warm_seconds: float = 300.0,
        grace_seconds: int = GRACE_SECONDS,
        runner: Sequence[str] = containers.RUNNERS["python"],
    ) -> None:
        self._engine = engine
        self._names = Names(namespace)
        self._limits = limits or Limits()
        self._image = image
        allowed = [_api_host(base_url), *allowed_hosts]
        self._egress_spec = partial(containers.egress, self._names, network=egress_network, allowed=allowed)
        self._sandbox_spec = partial(
            containers.sandbox,
            self._names,
            runtime=runtime,
            limits=self._limits,
            keep_warm_seconds=keep_warm_seconds,
            grace_seconds=grace_seconds,
        )
        self._stop_seconds = grace_seconds + containers.FORCE_SECONDS
        self._argv = list(runner)
        self._egress_lock = asyncio.Lock()
        self._knows_limits = False
        self._ended: dict[str, float] = {}  # when a container that has ended did so, by its id; it never runs again
        self._first_seen: dict[str, float] = {}

    async def acquire(self, session_id: str) -> DockerSandbox:
        """The session's sandbox, made if none runs. Waits for one that is just ending; its files are found again."""
        if not _ID.match(session_id):
            raise LaunchFailed("the session id cannot be the name of a container", retriable=False)
        with mapped():
            image = await self._engine.image_id(self._image)
            await self._tell_of_limits()
            await self._ensure_egress(image)
            for attempt in range(_ATTEMPTS):
                if attempt:
                    await asyncio.sleep(_ATTEMPT_PAUSE_SECONDS)
                with racing():
                    if sandbox := await self._find_or_make(session_id, image):
                        return sandbox
        raise LaunchFailed("the sandbox does not stay", retriable=True)

    async def _find_or_make(self, session_id: str, image: str) -> DockerSandbox | None:
        """One look at what is there, and one step towards a sandbox that answers. None: look again."""
        name = self._names.sandbox(session_id)
        spec = self._sandbox_spec(session_id, image=image)
        found = await self._engine.container(name)
        created, is_outdated = False, False
        if found is None:
            created = await self._create(session_id, spec)
            await self._engine.start(name)
        else:
            self._refuse_strangers(name, found)
            is_outdated = not _is_made_of(found, spec)
            if found["State"]["Status"] == "created" and not is_outdated:  # its maker is about to start it, or is dead
                await self._engine.start(name)
            elif found["State"]["Paused"]:
                raise LaunchFailed(f"somebody paused the sandbox: `docker unpause {name}`", retriable=False)
            elif not found["State"]["Running"]:
                await self._engine.remove(found["Id"])  # by its id: the name may be another's by now
                return None
        sandbox = DockerSandbox(self._engine, name, created, self._argv)
        state = await sandbox.hold()
        if state and not state["stopping"] and (state["runners"] or not is_outdated):
            return sandbox
        # It is ending, or lost, or nobody works in what an older image or older settings made.
        await self._engine.stop(name, self._stop_seconds)
        return None

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        """Nothing to do: a sandbox runs while it has a runner."""

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        """The sessions that have a container or a volume."""
        with mapped():
            ours = self._names.labels("sandbox")
            listed = await self._engine.containers([f"{key}={value}" for key, value in ours.items()])
            limit = asyncio.Semaphore(_INSPECTIONS_AT_ONCE)
            used_at = await asyncio.gather(*(self._used_at(entry, limit) for entry in listed))
            self._ended = {entry["Id"]: self._ended[entry["Id"]] for entry in listed if entry["Id"] in self._ended}
            volumes = await self._engine.volumes(
                [f"{key}={value}" for key, value in self._names.labels(containers.WORKSPACE).items()]
            )
        sessions = set()
        for entry, last in zip(listed, used_at, strict=True):
            session_id = entry["Labels"][containers.SESSION]
            sessions.add(session_id)
            running = entry["State"] not in _ENDED
            yield SandboxInfo(session_id, self._names.sandbox(session_id), float(entry["Created"]), last, running)
        kept = {volume["Labels"][containers.SESSION] for volume in volumes}
        self._first_seen = {each: at for each, at in self._first_seen.items() if each in kept - sessions}
        for volume in volumes:
            session_id = volume["Labels"][containers.SESSION]
            if session_id not in sessions:
                # Somebody has removed the container and with it the time of its last use. Files are kept too long
                # rather than too short: from when we first saw them so.
                seen = self._first_seen.setdefault(session_id, time.time())
                created = _timestamp(volume["CreatedAt"])
                yield SandboxInfo(session_id, self._names.sandbox(session_id), created, seen, False)

    async def release(self, sandbox_id: str) -> None:
        """Lets the runner hand over, ends the sandbox and deletes its files."""
        with mapped():
            found = await self._engine.container(sandbox_id)
            if found is not None:
                self._refuse_strangers(sandbox_id, found)
                await self._engine.stop(found["Id"], self._stop_seconds)
                await self._engine.remove(found["Id"], force=True)
            for part in (containers.HOME, containers.WORKSPACE):  # `sandboxes` finds what is left by the second
                name = self._names.volume(sandbox_id, part)
                if (volume := await self._engine.volume(name)) is not None:
                    self._refuse_strangers_volume(name, volume)
                    await self._engine.remove_volume(name)

    async def has_runner(self, session_id: str) -> bool:
        """Whether somebody serves the session. A sandbox that runs and does not answer counts: without a runner it
        ends by itself. Raises `LaunchFailed` when the Engine does not say."""
        name, state = self._names.sandbox(session_id), None
        with mapped():
            with racing():
                state = await DockerSandbox(self._engine, name, False, self._argv).hold()
            if state is None:
                found = await self._engine.container(name)
                return found is not None and bool(found["State"]["Running"])
        return bool(state["runners"])

    async def until_runners_end(self, session_id: str) -> None:
        """Returns when those that run now have ended, or the connection has: ask `has_runner` again. Raises
        `LaunchFailed`."""
        with mapped(), racing():
            async for _ in self._engine.execute(self._names.sandbox(session_id), _ENTER, b'{"do": "wait"}\n'):
                pass  # it says nothing

    async def stop(self, session_id: str) -> None:
        """Lets the session's runner hand over and ends its sandbox. The files stay. Raises `LaunchFailed`."""
        with mapped():
            await self._engine.stop(self._names.sandbox(session_id), self._stop_seconds)

    async def close(self) -> None:
        """Closes the connections. The sandboxes go on: the next worker finds them."""
        await self._engine.close()

    async def _create(self, session_id: str, spec: dict[str, Any]) -> bool:
        """Makes the container and its volumes; False when another host was faster."""
        name = self._names.sandbox(session_id)
        for part in (containers.WORKSPACE, containers.HOME):
            labels = self._names.labels(part, session_id)
            volume = containers.volume(self._names.volume(name, part), labels, self._limits.disk_mb)
            self._refuse_strangers_volume(volume["Name"], await self._engine.create_volume(volume))
        return await self._engine.create(name, spec)

    async def _tell_of_limits(self) -> None:
        """Once: what the sandboxes will be without."""
        if not self._knows_limits:
            missing = await self._engine.missing_limits()
            self._knows_limits = True
            if missing:
                reason = f"this Engine cannot limit {', '.join(missing)}: `docker info` says why"
                _log.warning(line("no_limit", provider=self.name, reason=reason))

    async def _ensure_egress(self, image: str) -> None:
        """The proxy runs, as these settings want it: without it a sandbox reaches nothing. Looked at each time."""
        name = self._names.egress
        spec = self._egress_spec(image=image)
        async with self._egress_lock:
            found = await self._engine.container(name)
            if found is not None:
                self._refuse_strangers(name, found)
            if found is not None and not _is_made_of(found, spec):
                await self._engine.remove(found["Id"], force=True)
                found = None
            with racing():  # another worker does the same
                if found is None:
                    volume = containers.volume(name, self._names.labels("egress"))
                    self._refuse_strangers_volume(name, await self._engine.create_volume(volume))
                    await self._engine.create(name, spec)
                if found is None or not found["State"]["Running"]:
                    await self._engine.start(name)

    def _refuse_strangers(self, name: str, found: dict[str, Any]) -> None:
        """Raises `LaunchFailed` for a container that has one of our names and is none of ours."""
        self._refuse(name, "container", found["Config"]["Labels"])

    def _refuse_strangers_volume(self, name: str, found: dict[str, Any]) -> None:
        """As for a container: creating a volume whose name is taken answers with what is there. One without any label
        is ours: an Engine whose disk was full made it so, or somebody brought a session's files back."""
        if found["Labels"]:
            self._refuse(name, "volume", found["Labels"])

    def _refuse(self, name: str, kind: str, labels: dict[str, str]) -> None:
        if labels.get(containers.NAMESPACE) != self._names.namespace:
            text = f"the name {name} is taken by a {kind} that is none of this environment's: remove or rename it"
            raise LaunchFailed(text, retriable=False)

    async def _used_at(self, entry: dict[str, Any], limit: asyncio.Semaphore) -> float:
        """When a listed container was last used: now, if it runs."""
        if entry["State"] not in _ENDED:
            return time.time()
        if entry["Id"] not in self._ended:
            async with limit:
                found = await self._engine.container(entry["Id"])
            finished = _timestamp(found["State"]["FinishedAt"]) if found else 0.0
            self._ended[entry["Id"]] = max(finished, float(entry["Created"]))
        return self._ended[entry["Id"]]


class DockerSandbox:
    """One session's container."""

    def __init__(self, engine: Engine, name: str, created: bool, argv: list[str]) -> None:
        self.id = name
        self.created = created
        self._engine = engine
        self._argv = argv

    async def start(self, launch: Launch) -> Started:
        """Sends process 1 the files and the job, and waits for the runner's ready line."""
        files = [(path, len(content)) for path, content in launch.files.items()]
        request = {"do": "start", "argv": self._argv, "files": files, "stdin": len(launch.stdin)}
        stdin = json.dumps(request).encode() + b"\n" + b"".join(launch.files.values()) + launch.stdin
        with mapped():
            async with aclosing(self._engine.execute(self.id, _ENTER, stdin)) as output:
                return await read_ready(output)

    async def tail(self, lines: int) -> str:
        """The end of the container's log: what its runners said."""
        with mapped():
            return await self._engine.log(self.id, lines)

    async def hold(self) -> dict[str, Any] | None:
        """What process 1 says of itself; it then waits a while for a `start`. None when it does not answer."""
        async with aclosing(self._engine.execute(self.id, _ENTER, b'{"do": "hold"}\n')) as output:
            async for line in output:
                try:
                    return dict(json.loads(line))
                except ValueError:  # the Engine's own words, where it could not start the command any more
                    return None
        return None


def _is_made_of(container: dict[str, Any], spec: dict[str, Any]) -> bool:
    """Whether a container was made with the same settings, of the same image."""
    return bool(container["Config"]["Labels"].get(containers.CONFIG) == spec["Labels"][containers.CONFIG])


def _api_host(base_url: str) -> str:
    """The API's host and port, as an entry of the allow-list. Raises `SettingsError` for a loopback address."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if host == "localhost" or egress.is_loopback(host):
        raise SettingsError(
            "ANTHROPIC_BASE_URL leads to this machine's loopback, where no container gets: serve it on the address of"
            " the Engine's bridge (mostly 172.17.0.1) and name that"
        )
    return f"{f'[{host}]' if ':' in host else host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _timestamp(text: str) -> float:
    """Seconds of one of the Engine's times, which have nanoseconds."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()
