"""What the emulator's tests share."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
from anthropic import AsyncAnthropic
from anthropic.lib.environments import EnvironmentWorker
from anthropic.lib.tools.agent_toolset import beta_agent_toolset_20260401
from anthropic.types.beta.environments import BetaSelfHostedWork

from tools.emulator import Emulator

MakeWorker = Callable[..., EnvironmentWorker]


def client_of(emulator: Emulator, credential: str) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=emulator.url, auth_token=credential, max_retries=0)


def worker_for(emulator: Emulator, client: AsyncAnthropic, workdir: Path, max_idle: float) -> EnvironmentWorker:
    """The SDK's own worker with its real tools."""
    return EnvironmentWorker(
        client,
        environment_id=emulator.environment_id,
        environment_key=emulator.environment_key,
        workdir=str(workdir),
        tools=beta_agent_toolset_20260401,
        max_idle=max_idle,
    )


def bearer(credential: str) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"}


def at(timestamp: str | None) -> datetime:
    assert timestamp is not None
    return datetime.fromisoformat(timestamp)


def types_of(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def idles(emulator: Emulator, session_id: str) -> list[dict[str, Any]]:
    """The stop reasons of the session's idle events, in order."""
    return [event["stop_reason"] for event in emulator.events(session_id, "session.status_idle")]


def result(call_id: str, text: str = "done", *, is_error: bool = False) -> dict[str, Any]:
    content = [{"type": "text", "text": text}]
    return {"type": "user.tool_result", "tool_use_id": call_id, "content": content, "is_error": is_error}


def custom_result(call_id: str, text: str = "done") -> dict[str, Any]:
    content = [{"type": "text", "text": text}]
    return {"type": "user.custom_tool_result", "custom_tool_use_id": call_id, "content": content}


async def claim(runner: AsyncAnthropic, environment_id: str) -> BetaSelfHostedWork:
    """Poll, ack and beat once: the item is active."""
    work = runner.beta.environments.work
    item = await work.poll(environment_id)
    assert item is not None
    await work.ack(item.id, environment_id=environment_id)
    await work.heartbeat(item.id, environment_id=environment_id, expected_last_heartbeat="NO_HEARTBEAT")
    return item


def token_of(secret: str | None) -> str:
    """The sessions token in a work item's secret."""
    assert secret is not None
    token: str = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))["sessions_token"]
    return token


def work_path(emulator: Emulator, rest: str = "") -> str:
    return f"/v1/environments/{emulator.environment_id}/work{rest}"


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


@contextlib.asynccontextmanager
async def serving(worker: EnvironmentWorker) -> AsyncIterator[None]:
    """The worker's poll loop, cancelled at the end."""
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
