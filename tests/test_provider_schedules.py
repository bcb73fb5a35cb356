"""The schedules suite finds what it is there to find: broken providers, and histories with a mistake in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.memory_provider import MemoryProvider, MemorySandbox
from tests.provider_schedules import Scene, answers, executions
from tests.providers.test_memory_schedules import MemorySchedules
from tests.world import SharedCore, World
from tools.emulator import Emulator


class Forgetful(MemoryProvider):
    """Makes a sandbox for each call and knows only the last one."""

    async def acquire(self, session_id: str) -> MemorySandbox:
        (self.root / f"{session_id}-{len(list(self.root.glob('*')))}").mkdir(parents=True)
        return await super().acquire(session_id)


class Lazy(MemoryProvider):
    async def acquire(self, session_id: str) -> MemorySandbox:
        self.fail_next("acquire_for_good")
        return await super().acquire(session_id)


class Broken(MemoryProvider):
    """Has an error of the vendor's that no table maps, once."""

    is_broken = True

    async def acquire(self, session_id: str) -> MemorySandbox:
        if self.is_broken:
            self.is_broken = False
            raise KeyError("state")
        return await super().acquire(session_id)


@pytest.mark.parametrize(("provider", "label"), [(Forgetful, "left"), (Lazy, "lost"), (Broken, "bug")])
async def test_a_broken_provider_is_found(provider: type[MemoryProvider], label: str, tmp_path: Path) -> None:
    class Suite(MemorySchedules):
        patience = 8.0 if label == "lost" else MemorySchedules.patience

        def make_provider(self, root: Path, settings: Any, **options: Any) -> MemoryProvider:
            return provider(root, **options)

    with Emulator() as emulator:
        violations, _ = await Suite().play(0, emulator, tmp_path / "sandboxes")
    assert violations
    assert {violation.partition(":")[0] for violation in violations} == {label}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Emulator() as emulator:
        scene = Scene(World(emulator, SharedCore(), MemoryProvider, tmp_path), 0, {}, shares_provider=True)
        scene.sessions.append(emulator.create_session())
        yield scene


def report(scene: Scene, *reports: str) -> list[str]:
    """What is found in a history of `call what runner`."""
    for each in reports:
        call, what, runner = each.split()
        scene.emulator.report_execution(f"{call} {what}", runner, scene.sessions[0])
    return [violation.partition(":")[0] for violation in executions(scene)]


def test_a_history_in_order_is_fine(scene: Scene) -> None:
    assert report(scene, "one begin 1", "one end 1", "two begin 1", "three begin 2", "three end 2") == []


def test_a_call_that_is_executed_again_is_found(scene: Scene) -> None:
    assert report(scene, "one begin 1", "one begin 1", "one end 1") == ["twice"]


def test_two_runners_at_once_are_found(scene: Scene) -> None:
    assert report(scene, "one begin 1", "two begin 2", "one end 1", "two end 2") == ["overlap"]


def test_answers_are_held_against_what_ran(scene: Scene) -> None:
    """A call that nobody answered, an answer to a call that did not run, and one that is an error."""
    emulator, (session,) = scene.emulator, scene.sessions
    emulator.say(session, "!echo one\n!echo two")
    assert [found.partition(":")[0] for found in answers(scene)] == ["unanswered"]
    _answer(emulator, session, "one")
    assert [found.partition(":")[0] for found in answers(scene)] == ["untrue", "unanswered"]
    report(scene, "one begin 1", "one end 1")
    _answer(emulator, session, "lost", is_error=True)
    assert answers(scene) == []


def _answer(emulator: Emulator, session: str, text: str, is_error: bool = False) -> None:
    (call,) = emulator.pending_calls(session)
    content = [{"type": "text", "text": text}]
    emulator.send(session, {"type": "user.tool_result", "tool_use_id": call, "content": content, "is_error": is_error})
