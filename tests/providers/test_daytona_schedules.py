"""Fault schedules on Daytona: what its API does when it fails, and what its platform does to sandboxes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.daytona import Box, DaytonaDouble
from tests.provider_schedules import ProviderSchedules, Scene, Trouble
from tests.providers.daytona_support import FOLDER, account, provider
from tests.providers.local_support import needs_bubblewrap


@needs_bubblewrap
class TestDaytonaSchedules(ProviderSchedules):
    core = FOLDER
    own_troubles = 2
    daytona: DaytonaDouble

    @pytest.fixture(autouse=True)
    def account(self, tmp_path: Path) -> Iterator[None]:
        with account(tmp_path / "daytona") as self.daytona:
            self.daytona.minute = 2.0  # a sandbox that no sweep renews stops after ten seconds
            yield

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        if settings.retention_seconds == 0:
            self.daytona.minute = 0.2
        return provider(self.daytona, settings, **options)

    def troubles(self) -> list[Trouble]:
        faults: dict[str, dict[str, Any]] = {
            "create fails once": {"operation": "create", "kind": "fail"},
            "create takes effect and is not heard of": {"operation": "create", "kind": "lose"},
            "get fails": {"operation": "get", "kind": "fail", "times": 3, "status": 503},
            "told to slow down": {"operation": "get", "kind": "fail", "status": 429, "headers": {"Retry-After": "1"}},
            "the toolbox is not there yet": {"operation": "execute", "kind": "fail", "times": 2, "status": 502},
            "the connection of a start is dropped": {"operation": "session.exec", "kind": "drop"},
            "a start takes effect and is not heard of": {"operation": "session.exec", "kind": "lose"},
            "the job's way is cut": {"operation": "session.input", "kind": "lose"},
            "logs are dropped": {"operation": "session.logs", "kind": "drop", "times": 3},
            "lists are old": {"operation": "list", "kind": "stale", "times": 5},
            "lists fail": {"operation": "list", "kind": "fail", "times": 3},
            "renewals fail": {"operation": "activity", "kind": "fail", "times": 2},
        }
        return [
            *(Trouble(name, self._fault(**fault)) for name, fault in faults.items()),
            Trouble("everything takes its time", self._slow),
            Trouble("the sandbox breaks in a call", self._broken(recoverable=False)),
            Trouble("the sandbox breaks in a call and can be recovered", self._broken(recoverable=True)),
            Trouble("the sandbox is deleted in a call", self._vanished),
            Trouble("the sandbox is stopped in a call", self._stopped),
            Trouble("the sandbox is archived in a call", self._archived),
        ]

    def _fault(self, **fault: Any) -> Any:
        async def arm(scene: Scene) -> None:
            self.daytona.fault(**fault)

        return arm

    async def _slow(self, scene: Scene) -> None:
        self.daytona.seconds = dict.fromkeys(self.daytona.seconds, 0.7)

    async def _box(self, scene: Scene) -> Box | None:
        session = await scene.until_in_a_call()
        return self.daytona.box(session) if session else None

    def _broken(self, *, recoverable: bool) -> Any:
        async def kill(scene: Scene) -> None:
            if box := await self._box(scene):
                self.daytona.kill(box, recoverable=recoverable)

        return kill

    async def _vanished(self, scene: Scene) -> None:
        if box := await self._box(scene):
            self.daytona.vanish(box)

    async def _stopped(self, scene: Scene) -> None:
        if box := await self._box(scene):
            self.daytona.stop(box)

    async def _archived(self, scene: Scene) -> None:
        if box := await self._box(scene):
            self.daytona.archive(box)

    async def calm(self, scene: Scene) -> None:
        self.daytona.clear_faults()

    async def leftovers(self, scene: Scene) -> list[str]:
        return [f"{box.name} is {box.state}" for box in self.daytona.existing()]
