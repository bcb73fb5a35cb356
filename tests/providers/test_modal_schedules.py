"""Fault schedules on the Modal provider: what its double can make go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib import Status

from tests.fakes.modal import ModalDouble
from tests.provider_schedules import ProviderSchedules, Scene, Trouble
from tests.providers.modal_support import MODAL, image, needs_bubblewrap, open_provider


@needs_bubblewrap
class TestModalSchedules(ProviderSchedules):
    core = MODAL
    seeds = 2

    @pytest.fixture(autouse=True)
    def _on_the_double(self) -> Iterator[None]:
        with ModalDouble() as double:
            double.control.time_scale = 5.0  # the shortest idle timeout, ten seconds, in two
            self._double = double
            self._image = image(double)
            yield
            assert double.wire.refused == []

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return open_provider(self._double, self._image, settings, **options)

    def troubles(self) -> list[Trouble]:
        return [
            Trouble("Modal is unavailable for a while", self._unavailable),
            Trouble("the workspace's limit is reached for a while", self._limit_reached),
            Trouble("the answer to a create is lost", self._create_lost),
            Trouble("a sandbox is slow to come", self._slow_create),
            Trouble("a command cannot be started", self._no_command),
            Trouble("a list fails", self._no_list),
            Trouble("a sandbox is lost in a call", self._lost_in_a_call),
        ]

    async def _unavailable(self, scene: Scene) -> None:
        times = scene.chance("unavailable").randint(2, 8)
        self._double.wire.fail("SandboxGetFromNameV2", Status.UNAVAILABLE, times=times)

    async def _limit_reached(self, scene: Scene) -> None:
        self._double.wire.fail("SandboxCreateV2", Status.RESOURCE_EXHAUSTED, times=3)

    async def _create_lost(self, scene: Scene) -> None:
        self._double.wire.fail("SandboxCreateV2", Status.UNAVAILABLE, after=True)

    async def _slow_create(self, scene: Scene) -> None:
        self._double.wire.fail("SandboxCreateV2", None, seconds=2.0)

    async def _no_command(self, scene: Scene) -> None:
        self._double.wire.fail("TaskExecStart", Status.INTERNAL, times=scene.chance("command").randint(1, 12))

    async def _no_list(self, scene: Scene) -> None:
        self._double.wire.fail("SandboxListV2", Status.UNAVAILABLE, times=6)

    async def _lost_in_a_call(self, scene: Scene) -> None:
        if session := await scene.until_in_a_call():
            for sandbox in self._double.running():
                if sandbox.tags["session"] == session:
                    await self._double.on_its_loop(self._double.control.end(sandbox))

    async def calm(self, scene: Scene) -> None:
        self._double.wire.heal()

    async def leftovers(self, scene: Scene) -> list[str]:
        running = [sandbox.id for sandbox in self._double.running()]
        files = list((self._double.volume(MODAL.sandbox.VOLUME).root).glob("*/*"))
        return [*running, *map(str, files)]
