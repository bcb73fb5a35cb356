"""Bakes the snapshot that sandboxes are made from. `python bake.py`; does nothing when it is there already.

Its name is a hash of what is in it, so the host knows which one belongs to this folder; sandboxes that exist keep what
they were made from.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from daytona import CreateSnapshotParams, DaytonaError, DaytonaNotFoundError, Image, Resources

import image
from _shared.errors import SandboxesError
from _shared.settings import load
from daytona_settings import DaytonaSettings
from sandbox import open_daytona

ACTIVE = "active"
PAGE = 100


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def bake(own: DaytonaSettings, *, force: bool = False) -> int:
    """Exit codes: 0 the snapshot is there, 1 it could not be baked."""
    name = image.name(own.cpu, own.memory_gib, own.disk_gib)
    daytona = open_daytona(own)
    try:
        try:
            found = await daytona.snapshot.get(name)
        except DaytonaNotFoundError:
            found = None
        if found is not None and found.state.value == ACTIVE and not force:
            say(f"{name} is there already")
            return 0
        if found is not None:
            say(f"{name} is {found.state.value}: deleting it first")
            await daytona.snapshot.delete(found)
        params = CreateSnapshotParams(
            name=name,
            image=_image(),
            resources=Resources(cpu=own.cpu, memory=own.memory_gib, disk=own.disk_gib),
        )
        await daytona.snapshot.create(params, on_logs=say)
    except DaytonaError as error:
        say(f"the snapshot was not baked: {error.message}")
        return 1
    finally:
        await daytona.close()  # type: ignore[no-untyped-call]
    say(f"baked {name}: a host in this folder uses it by itself")
    return 0


async def prune(own: DaytonaSettings) -> int:
    """Deletes the snapshots that were baked before, by whoever uses this Daytona organization. Exit codes as `bake`."""
    kept = image.name(own.cpu, own.memory_gib, own.disk_gib)
    daytona = open_daytona(own)
    try:
        old, number = [], 1
        while True:
            page = await daytona.snapshot.list(page=number, limit=PAGE)
            old += [each for each in page.items if image.NAME.fullmatch(each.name) and each.name != kept]
            if number >= page.total_pages:
                break
            number += 1
        for each in old:
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
    """The command line. Exit codes: 0 the snapshot is there, 1 it could not be baked, 2 a setting is wrong."""
    parser = argparse.ArgumentParser(description="Bakes the snapshot of the sandboxes. Settings: see README.md.")
    parser.add_argument("--force", action="store_true", help="bake it anew even when it is there")
    parser.add_argument("--show", action="store_true", help="print the name and the Dockerfile, and do nothing")
    parser.add_argument(
        "--prune", action="store_true", help="delete every other snapshot that bake.py has baked in this organization"
    )
    options = parser.parse_args()
    try:
        if options.show:
            say(f"# {image.name()}\n{image.dockerfile()}")
            return 0
        own = load(DaytonaSettings, os.environ)
        return asyncio.run(prune(own) if options.prune else bake(own, force=options.force))
    except (SandboxesError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
