"""Fault schedules on the in-memory provider: what fails here is the core's fault, or the suite's own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.fakes.memory_provider import MemoryProvider
from tests.provider_schedules import ProviderSchedules, Scene, Trouble
from tests.world import SharedCore


class MemorySchedules(ProviderSchedules):
    core = SharedCore()
    shares_provider = True

    def make_provider(self, root: Path, settings: Any, **options: Any) -> MemoryProvider:
        return MemoryProvider(root, **options)

    def troubles(self) -> list[Trouble]:
        return [
            Trouble("acquire fails twice", self._acquire_fails),
            Trouble("acquire fails for good, once", self._acquire_fails_for_good),
            Trouble("start fails", self._start_fails),
            Trouble("the sandbox is killed in a call", self._sandbox_killed),
        ]

    async def _acquire_fails(self, scene: Scene) -> None:
        scene.host.provider.fail_next("acquire", times=2)

    async def _acquire_fails_for_good(self, scene: Scene) -> None:
        scene.host.provider.fail_next("acquire_for_good")

    async def _start_fails(self, scene: Scene) -> None:
        scene.host.provider.fail_next("start")

    async def _sandbox_killed(self, scene: Scene) -> None:
        if session := await scene.until_in_a_call():
            for runner in scene.host.provider.live[session].runners:
                if runner.returncode is None:
                    os.killpg(runner.pid, signal.SIGKILL)

    async def calm(self, scene: Scene) -> None:
        scene.host.provider.disarm()

    async def leftovers(self, scene: Scene) -> list[str]:
        return [path.name for path in scene.host.provider.root.iterdir()]


class TestMemorySchedules(MemorySchedules):
    seeds = 2
