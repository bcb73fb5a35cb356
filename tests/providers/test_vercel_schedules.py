"""Fault schedules on the Vercel provider: what can go wrong with Vercel, at any moment of a few sessions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vercel import FakeVercel
from tests.provider_schedules import ProviderSchedules, Scene, Trouble
from tests.providers.vercel_support import VERCEL, make_provider, needs_machines, start_vercel


@needs_machines
class TestVercelSchedules(ProviderSchedules):
    core = VERCEL
    fake: FakeVercel
    seeds = 2

    @pytest.fixture(autouse=True)
    def vercel(self, tmp_path: Path) -> Iterator[None]:
        with start_vercel(tmp_path / "vercel") as self.fake:
            yield
            assert self.fake.refused == []

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return make_provider(self.fake, settings, **options)

    def troubles(self) -> list[Trouble]:
        return [
            Trouble("Vercel's API fails for a while", self._api_fails),
            Trouble("answers of Vercel's are lost", self._answers_lost),
            Trouble("a connection ends before the request arrives", self._requests_lost),
            Trouble("the sandbox is stopped in a call", self._sandbox_stopped),
            Trouble("Vercel asks to slow down", self._slow_down),
        ]

    async def _api_fails(self, scene: Scene) -> None:
        self.fake.fail(scene.chance("api").choice(["get", "create", "exec", "list"]), 503, times=3)

    async def _answers_lost(self, scene: Scene) -> None:
        self.fake.fail(scene.chance("answer").choice(["create", "exec", "stdin", "get"]), hang_up=True, after=True)

    async def _requests_lost(self, scene: Scene) -> None:
        self.fake.fail(scene.chance("request").choice(["create", "exec", "stdin", "logs"]), hang_up=True)

    async def _sandbox_stopped(self, scene: Scene) -> None:
        if session := await scene.until_in_a_call():
            (name,) = [each.name for each in self.fake.sandboxes.values() if each.tags["session"] == session]
            self.fake.end_session(name)

    async def _slow_down(self, scene: Scene) -> None:
        self.fake.fail("create", 429, "rate_limited", times=2)

    async def calm(self, scene: Scene) -> None:
        self.fake.calm()

    async def leftovers(self, scene: Scene) -> list[str]:
        return list(self.fake.sandboxes)
