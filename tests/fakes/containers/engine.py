"""The containers of providers/cloudflare-container without their Worker: a provider in Python that starts the image on
the Docker Engine and asks its first process what the Durable Object would ask. For the hostile agent, which meets the
image and never the Worker; the walls around a container are Docker's here, and the platform's in production.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx2

from shared.errors import LaunchFailed
from shared.provider import Launch, SandboxInfo, Started, read_ready
from tests.providers.docker_support import docker

PATIENCE_SECONDS = 60.0


class ImageSandbox:
    """One container. Its first process takes the first key it is given."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.created = True
        address = docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", name)
        self.client = httpx2.AsyncClient(
            base_url=f"http://{address}:8080",
            headers={"authorization": f"Bearer {uuid.uuid4()}"},
            timeout=PATIENCE_SECONDS,
            transport=httpx2.AsyncHTTPTransport(retries=20),  # it is just starting
        )

    async def start(self, launch: Launch) -> Started:
        sizes = {"files": [[path, len(content)] for path, content in launch.files.items()], "stdin": len(launch.stdin)}
        body = json.dumps(sizes).encode() + b"\n" + b"".join(launch.files.values()) + launch.stdin
        async with self.client.stream("POST", "/runners", content=body) as answer:
            if answer.status_code != 200:
                raise LaunchFailed((await answer.aread()).decode(), retriable=True)
            async with aclosing(_lines(answer)) as lines:
                return await read_ready(lines)

    async def tail(self, lines: int) -> str:
        return await asyncio.to_thread(docker, "logs", "--tail", str(lines), self.id)


class ImageProvider:
    name = "image"

    def __init__(self, image: str, prefix: str, *options: str) -> None:
        self._image = image
        self._prefix = prefix
        self._options = options
        self._sandboxes: dict[str, ImageSandbox] = {}
        self._lock = asyncio.Lock()

    async def acquire(self, session_id: str) -> ImageSandbox:
        async with self._lock:
            if session_id not in self._sandboxes:
                name = f"{self._prefix}-{session_id}"
                await asyncio.to_thread(docker, "run", "--detach", "--name", name, *self._options, self._image)
                sandbox = ImageSandbox(name)
                (await sandbox.client.put("/workspace", content=b"")).raise_for_status()
                self._sandboxes[session_id] = sandbox
            return self._sandboxes[session_id]

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        """Nothing to do."""

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        for session_id, sandbox in self._sandboxes.items():
            yield SandboxInfo(session_id, sandbox.id, 0.0, 0.0, True)

    async def release(self, sandbox_id: str) -> None:
        raise NotImplementedError("the attempts release nothing")

    async def close(self) -> None:
        for sandbox in self._sandboxes.values():
            await sandbox.client.aclose()
            await asyncio.to_thread(docker, "rm", "--force", "--volumes", sandbox.id)


async def _lines(answer: Any) -> AsyncGenerator[bytes, None]:
    async for line in answer.aiter_lines():
        yield line.encode()
