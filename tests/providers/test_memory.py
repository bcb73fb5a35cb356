"""The contract on the in-memory provider: what fails here is the core's fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.contract import ProviderContract
from tests.fakes.memory_provider import MemoryProvider, MemorySandbox
from tests.world import RECLAIM_SECONDS, SharedCore, World


class TestMemoryContract(ProviderContract):
    core = SharedCore()
    isolated = False

    def make_provider(self, root: Path, settings: Any, **options: Any) -> MemoryProvider:
        return MemoryProvider(root, **options)

    async def runner_is_alive(self, sandbox: MemorySandbox) -> bool:
        return sandbox.running

    async def test_a_failing_acquire_is_retried_within_the_launch(self, world: World) -> None:
        host = world.host()
        host.provider.fail_next("acquire", times=2)
        session = world.emulator.create_session()
        assert await host.ask(session, "!echo served") == "served"

    async def test_an_acquire_that_cannot_succeed_is_not_retried(self, world: World) -> None:
        host = world.host()
        host.provider.fail_next("acquire_for_good")
        session = world.emulator.create_session()
        world.emulator.say(session, "!echo served")
        await host.dispatcher.drain()
        assert world.emulator.work(session)["state"] == "queued"
        world.emulator.advance(RECLAIM_SECONDS)
        await host.dispatcher.drain()
        assert await host.answer(session) == "served"
