"""A running emulator and the real clients that talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest
from anthropic import AsyncAnthropic

from tests.emulator.support import MakeWorker, client_of, worker_for
from tools.emulator import Emulator


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def http(emulator: Emulator) -> Iterator[httpx2.Client]:
    """A bare client without a credential, for what the SDK would not send."""
    with httpx2.Client(base_url=emulator.url, headers={"anthropic-beta": "managed-agents-2026-04-01"}) as client:
        yield client


@pytest.fixture
async def owner(emulator: Emulator) -> AsyncIterator[AsyncAnthropic]:
    """The SDK with the API key."""
    async with client_of(emulator, emulator.api_key) as client:
        yield client


@pytest.fixture
async def runner(emulator: Emulator) -> AsyncIterator[AsyncAnthropic]:
    """The SDK with the environment key."""
    async with client_of(emulator, emulator.environment_key) as client:
        yield client


@pytest.fixture
def make_worker(emulator: Emulator, owner: AsyncAnthropic, tmp_path: Path) -> MakeWorker:
    """The SDK's own worker with its real tools, in a directory of this test."""

    return lambda max_idle=0.2: worker_for(emulator, owner, tmp_path, max_idle)
