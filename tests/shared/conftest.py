"""A running emulator, and dispatchers that are closed again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from shared.dispatcher import Dispatcher
from tests.shared.support import Detour, FakeProvider, dispatcher_for
from tools.emulator import Emulator

MakeDispatcher = Callable[..., Dispatcher]


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
async def client(emulator: Emulator) -> AsyncIterator[AsyncAnthropic]:
    """The SDK with the environment key: what a runner does, without one."""
    async with AsyncAnthropic(auth_token=emulator.environment_key, base_url=emulator.url) as client:
        yield client


@pytest.fixture
def detour() -> Detour:
    return Detour()


@pytest.fixture
async def make_dispatcher(emulator: Emulator, detour: Detour) -> AsyncIterator[MakeDispatcher]:
    made: list[Dispatcher] = []

    def make(provider: FakeProvider, *, on: Emulator = emulator, **more: Any) -> Dispatcher:
        dispatcher = dispatcher_for(on, provider, detour.client(on), **more)
        made.append(dispatcher)
        return dispatcher

    yield make
    for dispatcher in made:
        await dispatcher.close(0)
