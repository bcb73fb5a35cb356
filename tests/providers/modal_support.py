"""What the tests of the Modal provider share: the folder, a double, and a provider that talks to it."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modal
import pytest

from tests.fakes.modal import ModalDouble
from tests.fakes.modal.machine import problem
from tests.folders import load_folder

MODAL = load_folder("modal")
INSIDE = "/opt/sandbox"
PATIENCE_SECONDS = 60.0

# On CI nothing may be skipped: there the tests run, and fail with the reason.
needs_bubblewrap = pytest.mark.skipif(problem() is not None and not os.environ.get("CI"), reason=str(problem()))


def image(double: ModalDouble, files: dict[str, Path] | None = None) -> str:
    """An image as `image.py` describes it, without building it: the folder's files where the image has them."""
    ours = {
        f"{INSIDE}/_shared": MODAL.path / "_shared",
        f"{INSIDE}/sandbox_init.py": MODAL.path / "sandbox_init.py",
    }
    return double.add_image({**ours, **(files or {})})


def open_provider(double: ModalDouble, image_id: str, settings: Any, **options: Any) -> Any:
    """A provider with Modal's real client. Options in capitals are settings."""
    client, own = double.client, {name: value for name, value in options.items() if name.isupper()}
    return MODAL.sandbox.ModalProvider(
        MODAL.shared("settings").load(MODAL.module("modal_settings").ModalSettings, own),
        settings,
        image=modal.Image.from_id(image_id, client),
        client=client,
        **{name: value for name, value in options.items() if not name.isupper()},
    )


async def until(true: Callable[[], Any]) -> None:
    """Waits for something of the double's or the disk's to be so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)


class Sandboxes:
    """A provider over a double, and runs of a stand-in for the runner in its sandboxes."""

    RUNNER = "/opt/test/local_runner.py"

    def __init__(self, double: ModalDouble, settings: dict[str, str] | None = None, **options: Any) -> None:
        self.double = double
        needed = {"ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": "a-key"}
        self.settings = MODAL.shared("settings").Settings.from_env({**needed, **(settings or {})})
        files = {self.RUNNER: Path(__file__).with_name("local_runner.py")}
        self.provider = open_provider(double, image(double, files), self.settings, runner=self.RUNNER, **options)

    async def begin(self, session_id: str, *commands: str, files: dict[str, bytes] | None = None, **job: Any) -> Any:
        """Starts a run, and returns its sandbox and its number."""
        sandbox, run = await self.provider.acquire(session_id), uuid.uuid4().hex
        stdin = json.dumps({"run": run, "commands": commands, **job}).encode()
        started = await sandbox.start(MODAL.shared("provider").Launch(stdin=stdin, files=files or {}))
        assert started.outcome == "ready"
        return sandbox, run

    async def run(self, session_id: str, *commands: str, **job: Any) -> list[str]:
        """What `commands` print in the session's sandbox."""
        sandbox, run = await self.begin(session_id, *commands, **job)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                said = [line for line in (await sandbox.tail(100)).splitlines() if run in line]
                if said:
                    out: list[str] = json.loads(said[0])["out"]
                    return out
                await asyncio.sleep(0.02)

    async def infos(self) -> list[Any]:
        return [info async for info in self.provider.sandboxes()]

    def directory(self, session_id: str) -> Path:
        """Where the session's files are, on this machine."""
        return self.double.volume(MODAL.sandbox.VOLUME).root / "env_1" / session_id
