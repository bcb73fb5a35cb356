"""The Docker Engine, as far as this provider uses it, over aiodocker. Its errors become ours here, by one table."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import aiodocker
import aiohttp
from aiodocker.containers import DockerContainer
from aiodocker.volumes import DockerVolume

from _shared.errors import LaunchFailed

CONNECT_SECONDS = 10.0
CALL_SECONDS = 60.0  # one call of the API; a loaded Engine takes seconds for what is mostly done in 50 ms
UNREACHABLE = 900  # the status that aiodocker gives to a connection that failed

# What the Engine refuses: status, what its message says, whether the same may work in seconds, and the line for people.
# `{}` is the Engine's message: it quotes names and limits of ours, never a job, which it is not told in any call.
_TABLE: tuple[tuple[int | None, str, bool, str], ...] = (
    (UNREACHABLE, "Permission denied", False, "this user may not use the Docker Engine: {}"),
    (UNREACHABLE, "", True, "the Docker Engine does not answer: {}"),
    (404, "No such image", False, "the image is not on the Engine: build it (docker build -t NAME .): {}"),
    (404, "network .* not found", False, "DOCKER_EGRESS_NETWORK names no network of the Engine: {}"),
    (400, "failed to load .*permission denied", False, "DOCKER_RUNTIME needs another image (README, gVisor): {}"),
    (None, "no space left|disk quota exceeded", False, "the Engine's disk is full: {}"),
    (None, "quota", False, "DOCKER_DISK_MB needs storage with quotas, which this Engine has not: {}"),
    (None, "unable to find user|create failed.*no such file", False, "DOCKER_IMAGE is none of this Dockerfile's: {}"),
    (400, "unknown.*runtime", False, "DOCKER_RUNTIME names no runtime of the Engine: {}"),
    (400, "OCI runtime", False, "the Engine cannot run DOCKER_IMAGE: {}"),
    (400, "invalid reference format", False, "DOCKER_IMAGE is no name of an image: {}"),
    (403, "", False, "the Engine, or a proxy before it, does not allow a call that is needed: {}"),
    (400, "NanoCPUs|CPUs", False, "DOCKER_CPUS is more than the Engine has: {}"),
    (400, "memory limit", False, "DOCKER_MEMORY_MB is not what the Engine takes: {}"),
    (404, "", True, "what was just there is gone: {}"),
    (409, "", True, "another host is at work on the same sandbox: {}"),
    (500, "", True, "the Engine failed: {}"),
    (503, "", True, "the Engine failed: {}"),
)
_MESSAGE_CHARACTERS = 300
_LIMITS = {"MemoryLimit": "memory", "SwapLimit": "swap", "CpuCfsQuota": "CPU", "PidsLimit": "processes"}


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Turns what the Engine refuses into our error; what the table does not list is a bug and propagates."""
    try:
        yield
    except aiodocker.DockerError as error:
        for status, pattern, retriable, text in _TABLE:
            if status in (None, error.status) and re.search(pattern, error.message, re.IGNORECASE):
                reason = " ".join(error.message.split())[:_MESSAGE_CHARACTERS]
                raise LaunchFailed(text.format(reason), retriable=retriable) from error
        raise
    except (aiohttp.ClientError, ConnectionError) as error:
        raise LaunchFailed("the Docker Engine broke off", retriable=True) from error
    except TimeoutError as error:
        raise LaunchFailed("the Docker Engine does not answer in time", retriable=True) from error


def connect(url: str) -> aiodocker.Docker:
    """A client of the Engine at `url`. To be called in the event loop that uses it."""
    return aiodocker.Docker(url=url, timeout=aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=CONNECT_SECONDS))


class Engine:
    """A lazily opened client, with the calls this provider makes. `None` stands for what is not there."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: aiodocker.Docker | None = None

    @property
    def docker(self) -> aiodocker.Docker:
        if self._client is None:
            self._client = connect(self._url)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def missing_limits(self) -> list[str]:
        """What its kernel cannot limit; the Engine drops such a limit with a warning that nobody sees."""
        info = await self.docker.system.info()
        return [what for field, what in _LIMITS.items() if info.get(field) is False]

    async def container(self, name: str) -> dict[str, Any] | None:
        """What the Engine knows of a container."""
        with _absent():
            return await self.docker.containers.container(name).show()
        return None

    async def image_id(self, name: str) -> str:
        """What the image's name means now. Raises when the Engine has none of that name."""
        return str((await self.docker.images.inspect(name))["Id"])

    async def create(self, name: str, spec: dict[str, Any]) -> bool:
        """Creates a container, without starting it. False when the name is taken."""
        try:
            await self.docker.containers.create(spec, name=name)
        except aiodocker.DockerError as error:
            if error.status == 409:
                return False
            raise
        return True

    async def start(self, container_id: str) -> None:
        """Starts a container; one that runs already is fine."""
        await self.handle(container_id).start()

    async def stop(self, container_id: str, grace_seconds: int) -> None:
        """SIGTERM, then SIGKILL after the grace; returns when it has ended."""
        with _absent():
            await self.handle(container_id).stop(
                t=grace_seconds, timeout=aiohttp.ClientTimeout(total=grace_seconds + CALL_SECONDS)
            )

    async def remove(self, container_id: str, *, force: bool = False) -> None:
        """Removes a container. One that is gone, or being removed, or (without `force`) runs again, is left alone."""
        with _absent(409):
            await self.handle(container_id).delete(force=force)

    async def containers(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Every container with these labels, running or not."""
        found = await self.docker.containers.list(all=True, filters=json.dumps({"label": list(labels)}))
        return [container._container for container in found]

    async def volumes(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Every volume with these labels."""
        return (await self.docker.volumes.list(filters={"label": list(labels)}))["Volumes"] or []

    async def volume(self, name: str) -> dict[str, Any] | None:
        """What the Engine knows of a volume."""
        with _absent():
            return dict(await DockerVolume(self.docker, name).show())
        return None

    async def create_volume(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Creates a volume, or finds the one of that name. What it is."""
        return dict(await (await self.docker.volumes.create(spec)).show())

    async def remove_volume(self, name: str) -> None:
        """Removes a volume. One that is gone, or in use, is left alone."""
        with _absent(409):
            await DockerVolume(self.docker, name).delete()

    async def log(self, name: str, lines: int) -> str:
        """The end of a container's log."""
        with _absent():
            return "".join(await self.handle(name).log(stdout=True, stderr=True, tail=lines))
        return ""

    async def execute(self, container_id: str, argv: Sequence[str], stdin: bytes) -> AsyncGenerator[bytes, None]:
        """Runs a command in a container and yields the lines of its output. `stdin` is sent on the attached stream:
        the Engine records the command, and never what flows (R11)."""
        execution = await self.handle(container_id).exec(list(argv), stdin=True, stdout=True, stderr=True)
        async with execution.start() as stream:
            await stream.write_in(stdin)
            pending = b""
            while (message := await stream.read_out()) is not None:
                *lines, pending = (pending + message.data).split(b"\n")
                for line in lines:
                    yield line
            if pending:
                yield pending

    def handle(self, container_id: str) -> DockerContainer:
        return self.docker.containers.container(container_id)


@contextlib.contextmanager
def racing() -> Iterator[None]:
    """Several hosts find, make and remove the same container: who comes too late looks again."""
    try:
        yield
    except aiodocker.DockerError as error:
        if error.status != 409 and not (error.status == 404 and "No such container" in error.message):
            raise


@contextlib.contextmanager
def _absent(*also: int) -> Iterator[None]:
    """What is not there need not be removed, and cannot be shown."""
    try:
        yield
    except aiodocker.DockerError as error:
        if error.status not in (404, *also):
            raise
