"""A running emulator, a proxy in front of it, and a sandbox's directory."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from anthropic.lib.environments import _worker

from tests.runner.proxy import Proxy
from tests.runner.support import Start, runners
from tools.emulator import Emulator, Switches


@pytest.fixture
def switches() -> Switches:
    return Switches()


@pytest.fixture
def lease_ttl() -> float:
    """Seconds. A runner in this process need not have less to beat sooner: `quick_beats`."""
    return 300.0


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK beats every second, and not every 30 s, under a lease that a slow machine does not lose."""
    monkeypatch.setattr(_worker, "_HEARTBEAT_DEFAULT", 1.0)


@pytest.fixture
def emulator(switches: Switches, lease_ttl: float) -> Iterator[Emulator]:
    with Emulator(switches=switches, lease_ttl=lease_ttl) as emulator:
        yield emulator


@pytest.fixture
async def proxy(emulator: Emulator) -> AsyncIterator[Proxy]:
    async with Proxy(emulator.url) as proxy:
        yield proxy


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts runner processes of one sandbox, in `tmp_path`."""
    async with runners(tmp_path) as start:
        yield start


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter and write to; pytest's own are for one user."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o777)
        for below in ("workspace", "state", "home"):
            (directory / below).mkdir()
            (directory / below).chmod(0o777)
        yield directory
