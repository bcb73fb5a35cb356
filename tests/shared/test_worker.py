"""The always-on poller: in this process with a dispatcher that only counts, and as the command people start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import worker
from shared.dispatcher import Dispatcher
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import FakeProvider, Gate, count, failed, polls, until
from tools.emulator import Emulator

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 60.0
SHORT = (0.01, 0.02)


class Counting(Dispatcher):
    """Counts what it is told, and says so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sweeps = self.wakes = 0
        self.swept = asyncio.Event()
        self.woken = asyncio.Event()
        self.hangs = False
        self.cancelled = False
        self._error = error

    def wake(self, _event: object = None) -> None:
        self.wakes += 1
        self.woken.set()

    async def sweep(self) -> None:
        self.sweeps += 1
        self.swept.set()
        if self._error is not None:
            raise self._error
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled = True


async def test_it_sweeps_at_once_and_polls_in_between() -> None:
    dispatcher, stop = Counting(), asyncio.Event()
    running = asyncio.create_task(worker.run(dispatcher, stop=stop, pause_seconds=SHORT))
    await dispatcher.woken.wait()
    assert dispatcher.sweeps == 1
    stop.set()
    await running


async def test_it_sweeps_again_when_it_is_time() -> None:
    dispatcher, stop = Counting(), asyncio.Event()
    running = asyncio.create_task(worker.run(dispatcher, stop=stop, pause_seconds=SHORT, poll=False, sweep_seconds=0))
    await dispatcher.swept.wait()
    dispatcher.swept.clear()
    await dispatcher.swept.wait()
    assert dispatcher.wakes == 0
    stop.set()
    await running


async def test_it_leaves_the_waking_to_webhooks_when_told_to() -> None:
    class Soon(asyncio.Event):
        """Set once it has been looked at so many times."""

        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 10

    dispatcher = Counting()
    await worker.run(dispatcher, stop=Soon(), poll=False, pause_seconds=SHORT)
    assert (dispatcher.sweeps, dispatcher.wakes) == (1, 0)


async def test_new_work_does_not_wait_for_a_long_sweep_nor_does_the_end() -> None:
    dispatcher, stop = Counting(), asyncio.Event()
    dispatcher.hangs = True
    running = asyncio.create_task(worker.run(dispatcher, stop=stop, pause_seconds=SHORT, sweep_seconds=0))
    await dispatcher.woken.wait()
    assert dispatcher.sweeps == 1  # one at a time
    stop.set()
    await running
    assert dispatcher.cancelled


async def test_a_sweep_that_ends_in_a_bug_ends_the_worker() -> None:
    """It is started again by whatever keeps it alive; without its sweep it would only look well."""
    with pytest.raises(KeyError):
        await worker.run(Counting(KeyError("unmapped")), stop=asyncio.Event(), poll=False, pause_seconds=SHORT)


async def test_new_work_does_not_wait_for_a_launch_that_hangs(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    gate = Gate()
    provider = FakeProvider(gate)
    stop = asyncio.Event()
    first = emulator.create_session()
    running = asyncio.create_task(worker.run(make_dispatcher(provider), stop=stop, pause_seconds=SHORT))
    assert await gate.entered.get() == first
    second = emulator.create_session()
    assert await gate.entered.get() == second
    stop.set()
    await running


async def test_it_outlives_a_provider_that_answers_nothing(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    gate = Gate()
    provider = FakeProvider(gate)
    provider.broken["sandboxes"] = failed(retriable=False)
    stop = asyncio.Event()
    running = asyncio.create_task(
        worker.run(make_dispatcher(provider), stop=stop, pause_seconds=SHORT, sweep_seconds=0)
    )
    await until(emulator, lambda: count(emulator, "work.list") == 2)  # two sweeps came as far as that
    assert not running.done()
    session = emulator.create_session()
    provider.broken.clear()
    assert await gate.entered.get() == session
    stop.set()
    await running


# --- the command -----------------------------------------------------------------------------------------------------

SANDBOX = """
from dataclasses import dataclass
from shared.provider import Started
from shared.settings import count, setting

@dataclass(frozen=True)
class TinySettings:
    size: int = setting("TINY_SIZE", "How tiny.", parse=count, default=1)

SETTINGS = (TinySettings,)

class Sandbox:
    id, created = "box", True
    async def start(self, launch):
        return Started("ready")

class Provider:
    name = "tiny"
    async def acquire(self, session_id):
        return Sandbox()
    async def sandboxes(self):
        for info in ():
            yield info
    async def close(self):
        print("the provider is closed", flush=True)

def open_provider(environ, settings):
    return Provider()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sandbox.py").write_text(SANDBOX)
    return tmp_path


@pytest.fixture
def running(emulator: Emulator, folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
    }
    process = start(folder, environment)
    yield process
    process.kill()
    process.communicate()


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shared.worker"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(
    emulator: Emulator, running: subprocess.Popen[str], number: signal.Signals
) -> None:
    session = emulator.create_session()
    emulator.wait_until(lambda: polls(emulator) >= 2, PATIENCE_SECONDS)
    running.send_signal(number)
    out, err = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 0
    assert out == "the provider is closed\n"
    assert "action=polling provider=tiny" in err
    assert f"action=launched provider=tiny session={session}" in err
    assert "action=stopped provider=tiny" in err
    assert emulator.environment_key not in err
    assert "Traceback" not in err


def test_a_wrong_setting_is_exit_2_and_a_line_that_names_it(folder: Path) -> None:
    process = start(folder, {"SANDBOX_MAX_LIVE": "many", "TINY_SIZE": "none"})
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "action=settings" in line
    for name in ("ANTHROPIC_ENVIRONMENT_ID", "ANTHROPIC_ENVIRONMENT_KEY", "SANDBOX_MAX_LIVE", "TINY_SIZE"):
        assert name in line
    assert "many" not in line
