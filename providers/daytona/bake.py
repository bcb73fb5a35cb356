"""Bakes the snapshot that sandboxes are made from. `python bake.py`; does nothing when it is there already.

Its name is a hash of what is in it, so the host knows which one belongs to this folder; sandboxes that exist keep what
they were made from. What is under way is waited for: somebody else's build, a deletion. Names are unique at Daytona,
and one is taken until its deletion has ended, some time after it was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from daytona import (
    AsyncDaytona,
    CreateSnapshotParams,
    DaytonaConflictError,
    DaytonaError,
    DaytonaNotFoundError,
    Image,
    Resources,
)
from daytona.common.snapshot import Snapshot

import image
from _shared.errors import SandboxesError
from _shared.settings import load
from daytona_errors import activate
from daytona_settings import DaytonaSettings, Size
from sandbox import open_daytona

ACTIVE, INACTIVE, REMOVING = "active", "inactive", "removing"
SETTLED = frozenset({ACTIVE, INACTIVE, "error", "build_failed"})  # in any other state something is under way
WAIT_SECONDS = 30 * 60  # for what is under way
POLL_SECONDS = 0.5
TOLD_SECONDS = 15.0  # between two lines that say what is waited for
PAGE = 100


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def bake(own: DaytonaSettings, *, force: bool = False) -> int:
    """Exit codes: 0 the snapshot is there, 1 it could not be baked."""
    name = image.name(own.cpu, own.memory_gib, own.disk_gib)
    daytona = open_daytona(own)
    try:
        while (found := await _settled(daytona, name)) is None or force or found.state.value != ACTIVE:
            if found is None:
                if await _create(daytona, own, name):
                    say(f"baked {name}: a host in this folder uses it by itself")
                    return 0
            elif found.state.value == INACTIVE and not force:
                say(f"{name} is inactive, as what is not used for long becomes: activating it")
                await activate(daytona, found)
            else:
                say(f"{name} is {found.state.value}: deleting it first")
                with contextlib.suppress(DaytonaNotFoundError):
                    await daytona.snapshot.delete(found)
            force = False
    except DaytonaError as error:
        say(f"the snapshot was not baked: {error.message}")
        return 1
    except TimeoutError:
        say(f"the snapshot was not baked: what is under way has not ended in {WAIT_SECONDS // 60} minutes")
        return 1
    finally:
        await daytona.close()  # type: ignore[no-untyped-call]
    say(f"{name} is there already")
    return 0


async def _settled(daytona: AsyncDaytona, name: str) -> Snapshot | None:
    """The snapshot, once nothing is under way with it, or None. Raises `TimeoutError`."""
    told, at = "", 0.0
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                found = await daytona.snapshot.get(name)
            except DaytonaNotFoundError:
                return None
            if found.state.value in SETTLED:
                return found
            if found.state.value != told or time.monotonic() > at + TOLD_SECONDS:
                told, at = found.state.value, time.monotonic()
                say(f"{name} is {told}: waiting")
            await asyncio.sleep(POLL_SECONDS)


async def _create(daytona: AsyncDaytona, own: DaytonaSettings, name: str) -> bool:
    """Whether this one has baked it, and not somebody else who was faster."""
    size = Resources(cpu=own.cpu, memory=own.memory_gib, disk=own.disk_gib)
    try:
        await daytona.snapshot.create(CreateSnapshotParams(name=name, image=_image(), resources=size), on_logs=say)
    except DaytonaConflictError:
        return False
    return True


async def prune(own: DaytonaSettings) -> int:
    """Deletes the snapshots that were baked before, by whoever uses this Daytona organization. Exit codes as `bake`."""
    kept = image.name(own.cpu, own.memory_gib, own.disk_gib)
    daytona = open_daytona(own)
    try:
        old, number = [], 1
        while True:
            page = await daytona.snapshot.list(page=number, limit=PAGE)
            ours = [each for each in page.items if image.NAME.fullmatch(each.name) and each.name != kept]
            old += [each for each in ours if each.state.value != REMOVING]
            if number >= page.total_pages:
                break
            number += 1
        for each in old:
            with contextlib.suppress(DaytonaNotFoundError):
                await daytona.snapshot.delete(each.id)
            say(f"deleted {each.name}")
    except DaytonaError as error:
        say(f"old snapshots are left: {error.message}")
        return 1
    finally:
        await daytona.close()  # type: ignore[no-untyped-call]
    say(f"{len(old)} old snapshots deleted, {kept} kept")
    return 0


def _image() -> Image:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "Dockerfile")
        path.write_text(image.dockerfile(), encoding="utf-8")
        return Image.from_dockerfile(path)


def main() -> int:
    """The command line. Exit codes: as `bake`, 2 a setting is wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Bakes the snapshot of the sandboxes. Settings: see README.md.")
    parser.add_argument("--force", action="store_true", help="bake it anew even when it is there")
    parser.add_argument("--show", action="store_true", help="print the name and the Dockerfile, and do nothing")
    parser.add_argument(
        "--prune", action="store_true", help="delete every other snapshot that bake.py has baked in this organization"
    )
    options = parser.parse_args()
    try:
        if options.show:
            size = load(Size, os.environ)  # it needs no key
            say(f"# {image.name(size.cpu, size.memory_gib, size.disk_gib)}\n{image.dockerfile()}")
            return 0
        own = load(DaytonaSettings, os.environ)
        return asyncio.run(prune(own) if options.prune else bake(own, force=options.force))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: what has begun goes on at Daytona; the same command again waits for it\n")
        return 130
    except (SandboxesError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
