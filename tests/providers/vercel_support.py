"""What the tests of the Vercel provider share: the double with a baked snapshot, and providers that talk to it."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from vercel.sandbox import SandboxClient, SandboxServiceOptions
from vercel.sandbox._internal.options import SandboxCredentials

from tests.fakes.vercel import FakeVercel, missing
from tests.fakes.vercel.api import PROJECT, TEAM, TOKEN
from tests.folders import load_folder

VERCEL = load_folder("vercel")
IMAGE = VERCEL.module("image").load(VERCEL.path)
SNAPSHOT = "snap_baked"
AGENT_UID = 1001
PROBLEM = missing()

# On CI nothing may be skipped: there the tests run, and fail with the reason.
needs_machines = pytest.mark.skipif(PROBLEM is not None and not os.environ.get("CI"), reason=str(PROBLEM))


def start_vercel(directory: Path, *, shown: tuple[Path, ...] = (), **options: Any) -> FakeVercel:
    """The double, with the snapshot that `bake.py` would have made; the SDK in it is this process's own."""
    fake = FakeVercel(directory, shown=(Path(sys.prefix), *shown), **options)
    fake.add_snapshot(SNAPSHOT, bake)
    return fake


def bake(disk: Path) -> None:
    root = disk / VERCEL.module("image").ROOT[1:]
    sdk = root / IMAGE.sdk
    (sdk / "bin").mkdir(parents=True)
    (sdk / "bin/python").symlink_to(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    (sdk / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n")
    packages = Path("lib", f"python3.{sys.version_info.minor}", "site-packages")
    (sdk / packages).parent.mkdir(parents=True)
    (sdk / packages).symlink_to(Path(sys.prefix) / packages)
    (sdk / "ready").touch()
    with tarfile.open(fileobj=io.BytesIO(IMAGE.archive)) as archive:
        archive.extractall(root / "incoming", filter="data")
    (root / "incoming/runner").rename(root / IMAGE.runner)
    for directory, mode in (("workspace", 0o755), ("mnt/memory", 0o755), ("var/lib/sandbox-runner", 0o700)):
        _agents(disk / directory, mode)
    _agents(disk / "home/agent", 0o700)
    for name, entry in (
        ("passwd", f"agent:x:{AGENT_UID}:{AGENT_UID}::/home/agent:/bin/bash"),
        ("group", f"agent:x:{AGENT_UID}:"),
    ):
        with (disk / "etc" / name).open("a") as file:
            file.write(entry + "\n")


def _agents(directory: Path, mode: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(mode)
    os.chown(directory, AGENT_UID, AGENT_UID)


def open_client(fake: FakeVercel) -> SandboxClient:
    async def credentials() -> SandboxCredentials:
        return SandboxCredentials(token=TOKEN, team_id=TEAM, project_id=PROJECT)

    return SandboxClient.create(options=SandboxServiceOptions(base_url=fake.url, credentials_factory=credentials))


def make_provider(fake: FakeVercel, settings: Any, *, store: Any = None, program: str | None = None, **own: Any) -> Any:
    """A provider of its own connections: another instance of the function."""
    values = {"snapshot_id": SNAPSHOT, "allowed_hosts": ("*",), **own}
    return VERCEL.sandbox.VercelProvider(
        open_client(fake),
        settings,
        VERCEL.module("vercel_settings").VercelSettings(**values),
        store=store,
        program=program,
        wanted=IMAGE,
    )
