"""What the tests of the Daytona provider share: the real client on the double, and a snapshot with the real runner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from daytona import AsyncDaytona, DaytonaConfig

from tests.fakes.daytona import DaytonaDouble
from tests.folders import load_folder

FOLDER = load_folder("daytona")
SNAPSHOT = "baked"
ENVIRONMENT = "env_test"
PATIENCE_SECONDS = 60.0


@contextmanager
def account(root: Path) -> Iterator[DaytonaDouble]:
    """A double with a baked snapshot, that everything was known to."""
    with DaytonaDouble(root) as daytona:
        daytona.add_snapshot(SNAPSHOT, {"runner": FOLDER.path / "_shared"})
        yield daytona
    assert daytona.refused == []


def provider(daytona: DaytonaDouble, settings: Any = None, **options: Any) -> Any:
    """The provider as a host has it, with the real client."""
    client = AsyncDaytona(DaytonaConfig(api_key=daytona.key, api_url=daytona.url, target="us"))
    if settings is not None:
        options = {
            "keep_warm_seconds": settings.keep_warm_seconds,
            "retention_seconds": settings.retention_seconds,
            "environment_id": settings.environment_id,
        } | options
    return FOLDER.sandbox.DaytonaProvider(client, **{"environment_id": ENVIRONMENT, "snapshot": SNAPSHOT} | options)


@asynccontextmanager
async def provided(daytona: DaytonaDouble, **options: Any) -> AsyncIterator[Any]:
    it = provider(daytona, **options)
    try:
        yield it
    finally:
        await it.close()


async def until(true: Callable[[], Any]) -> None:
    """Waits for a condition on real state; fails when it does not come true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)
