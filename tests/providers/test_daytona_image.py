"""What the snapshot is made of, and how it is baked: the real client, a build that unpacks and checks for real."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.daytona import DaytonaDouble
from tests.folders import Folder
from tests.providers.daytona_support import FOLDER, PATIENCE_SECONDS, until
from tests.providers.local_support import needs_bubblewrap

image, bake = FOLDER.module("image"), FOLDER.module("bake")


@pytest.fixture
def daytona(tmp_path: Path) -> Iterator[DaytonaDouble]:
    with DaytonaDouble(tmp_path / "daytona") as daytona:
        yield daytona
    assert daytona.refused == []


@pytest.fixture
def copy(tmp_path: Path) -> Folder:
    """A folder that may be changed."""
    path = tmp_path / "copy"
    shutil.copytree(FOLDER.path, path, ignore=shutil.ignore_patterns("__pycache__", ".venv"))
    return Folder(path)


def settings(daytona: DaytonaDouble, **more: Any) -> Any:
    return FOLDER.module("daytona_settings").DaytonaSettings(api_key=daytona.key, api_url=daytona.url, **more)


def names(folder: Folder) -> tuple[str, str]:
    module = folder.module("image")
    return module.name(), module.name(2, 4, 8)


def test_the_name_is_of_what_is_in_it(copy: Folder) -> None:
    assert names(copy) == names(FOLDER)  # and of nothing else: not of a path, not of a time
    seen = {names(copy)}
    changes = {
        "sandbox.Dockerfile": "RUN true\n",
        "_shared/runner_lock.py": "# changed\n",
        "sandbox_files/tools.py": "new",
        "sandbox_files/deep/tools.py": "new",
    }
    for path, text in changes.items():
        file = copy.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(text)
        seen.add(names(copy))
    assert len(seen) == 1 + len(changes)
    assert all(small != large for small, large in seen)


def test_what_the_host_needs_is_not_in_the_image(copy: Folder) -> None:
    before = names(copy)
    (copy.path / "_shared" / "dispatcher.py").write_text("# changed")
    (copy.path / ".env").write_text("DAYTONA_API_KEY=dtn_secret")
    assert names(copy) == before


@pytest.mark.parametrize("line", ["COPY", "copy", "  Add"])
def test_a_dockerfile_that_copies_is_refused_with_its_line(copy: Folder, line: str) -> None:
    (copy.path / "sandbox.Dockerfile").write_text(f"FROM x\n{line} a b\n")
    with pytest.raises(ValueError, match=r"sandbox\.Dockerfile:2: no COPY or ADD"):
        copy.module("image").dockerfile()


def test_files_that_are_too_large_are_refused(copy: Folder) -> None:
    (copy.path / "sandbox_files").mkdir()
    (copy.path / "sandbox_files" / "large.bin").write_bytes(os.urandom(200_000))
    with pytest.raises(ValueError, match="too large"):
        copy.module("image").dockerfile()


def test_no_line_is_longer_than_a_dockerfile_may_have() -> None:
    assert max(map(len, image.dockerfile().splitlines())) < 2000


def test_the_image_has_the_sdk_that_the_folder_pins_and_no_sudo() -> None:
    pins = tomllib.loads((FOLDER.path / "pyproject.toml").read_text())["project"]["dependencies"]
    (pinned,) = [re.sub(r"\[.*\]", "", pin) for pin in pins if pin.startswith("anthropic")]
    text = image.dockerfile()
    assert pinned in text
    assert not re.search(r"^RUN.*\bsudo\b", text, re.MULTILINE)
    assert text.splitlines()[-2:] == ["USER sandbox", f"RUN python3 -I {image.RUNNER} --check"]


@needs_bubblewrap
async def test_it_is_baked_once_and_again_when_asked(
    daytona: DaytonaDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    daytona.seconds["bake"] = 0.5
    assert await bake.bake(settings(daytona, cpu=2, memory_gib=4)) == 0
    assert "runner_lock.py" in [path.name for path in daytona.images[image.name(2, 4)].glob("runner/*")]
    assert '"name": "hidden", "ok": true' in capsys.readouterr().out  # the build's log: what --check found
    assert (daytona.snapshots[image.name(2, 4)]["cpu"], daytona.snapshots[image.name(2, 4)]["mem"]) == (2, 4)
    assert await bake.bake(settings(daytona, cpu=2, memory_gib=4)) == 0
    assert daytona.count("snapshot.create") == 1
    assert "is there already" in capsys.readouterr().out
    assert await bake.bake(settings(daytona, cpu=2, memory_gib=4), force=True) == 0
    assert daytona.count("snapshot.create") == 2


@needs_bubblewrap
async def test_a_failed_build_is_told_and_can_be_repeated(
    daytona: DaytonaDouble, copy: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (copy.path / "sandbox.Dockerfile").read_text()
    (copy.path / "_shared" / "runner_lock.py").write_text("raise RuntimeError('broken')")
    baking = copy.module("bake")
    assert await baking.bake(settings(daytona)) == 1
    assert "the snapshot was not baked" in capsys.readouterr().out
    shutil.copy(FOLDER.path / "_shared" / "runner_lock.py", copy.path / "_shared" / "runner_lock.py")
    assert whole == (copy.path / "sandbox.Dockerfile").read_text()
    assert await baking.bake(settings(daytona)) == 0


async def test_a_new_one_waits_until_the_old_one_is_really_gone(
    daytona: DaytonaDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    daytona.add_snapshot(image.name(), {})
    daytona.seconds["remove"] = 1.0
    assert await bake.bake(settings(daytona), force=True) == 0
    said = capsys.readouterr().out
    assert "is removing: waiting" in said
    assert f"baked {image.name()}" in said
    assert daytona.count("snapshot.delete") == 1


@pytest.mark.parametrize("state", ["pending", "building", "pulling", "removing"])
async def test_what_somebody_else_has_begun_is_waited_for(daytona: DaytonaDouble, state: str) -> None:
    daytona.add_snapshot(image.name(), {})
    daytona.snapshots[image.name()]["state"] = state
    baking = asyncio.create_task(bake.bake(settings(daytona)))
    await until(lambda: daytona.count("snapshot.get") >= 2)
    assert daytona.count("snapshot.delete") == daytona.count("snapshot.create") == 0
    daytona.snapshots[image.name()]["state"] = "active"
    assert await baking == 0
    assert daytona.count("snapshot.delete") == daytona.count("snapshot.create") == 0


async def test_of_two_who_bake_at_once_one_waits_for_the_other(daytona: DaytonaDouble) -> None:
    daytona.seconds["bake"] = 0.5
    assert list(await asyncio.gather(bake.bake(settings(daytona)), bake.bake(settings(daytona)))) == [0, 0]
    assert daytona.count("snapshot.create", 200) == 1
    assert daytona.count("snapshot.delete") == 0


async def test_what_never_ends_is_told(
    daytona: DaytonaDouble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    daytona.add_snapshot(image.name(), {})
    daytona.snapshots[image.name()]["state"] = "pulling"
    monkeypatch.setattr(bake, "WAIT_SECONDS", 1)
    assert await bake.bake(settings(daytona)) == 1
    assert "what is under way has not ended" in capsys.readouterr().out


async def test_an_inactive_one_is_activated(daytona: DaytonaDouble, capsys: pytest.CaptureFixture[str]) -> None:
    daytona.add_snapshot(image.name(), {})
    daytona.snapshots[image.name()]["state"] = "inactive"
    daytona.seconds["activate"] = 0.5
    assert await bake.bake(settings(daytona)) == 0
    assert daytona.snapshots[image.name()]["state"] == "active"
    assert daytona.count("snapshot.create") == daytona.count("snapshot.delete") == 0
    assert "activating it" in capsys.readouterr().out


async def test_one_that_cannot_be_activated_is_told(daytona: DaytonaDouble, capsys: pytest.CaptureFixture[str]) -> None:
    daytona.add_snapshot(image.name(), {})
    daytona.snapshots[image.name()]["state"] = "inactive"
    daytona.fault("snapshot.activate", "fail", status=400)
    assert await bake.bake(settings(daytona)) == 1
    assert "not baked: Failed to activate" in capsys.readouterr().out


async def test_old_snapshots_are_deleted_when_asked_and_nobody_elses(
    daytona: DaytonaDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    current, theirs = image.name(), "their-snapshot"
    old = [f"sandboxes-{number:016x}" for number in range(4)]
    for name in (*old[:2], current, theirs, *old[2:]):
        daytona.add_snapshot(name, {})
    daytona.page = 2
    daytona.add_snapshot("sandboxes-ffffffffffffffff", {})
    daytona.snapshots["sandboxes-ffffffffffffffff"]["state"] = "removing"
    assert await bake.prune(settings(daytona)) == 0
    await until(lambda: len(daytona.snapshots) == 3)
    assert sorted(daytona.snapshots) == sorted([current, theirs, "sandboxes-ffffffffffffffff"])
    assert "4 old snapshots deleted" in capsys.readouterr().out


def test_what_it_would_bake_can_be_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bake.py", "--show"])
    assert bake.main() == 0
    assert capsys.readouterr().out == f"# {image.name()}\n{image.dockerfile()}\n"
    monkeypatch.setenv("DAYTONA_CPU", "2")
    assert bake.main() == 0
    assert capsys.readouterr().out.startswith(f"# {image.name(2)}\n")


def test_interrupted_it_says_what_goes_on(daytona: DaytonaDouble, tmp_path: Path) -> None:
    daytona.add_snapshot(image.name(), {})
    daytona.snapshots[image.name()]["state"] = "building"
    environ = {**os.environ, "DAYTONA_API_KEY": daytona.key, "DAYTONA_API_URL": daytona.url}
    arguments = [sys.executable, str(FOLDER.path / "bake.py")]
    with subprocess.Popen(arguments, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as baking:
        assert baking.stdout is not None
        assert "is building: waiting" in baking.stdout.readline()
        baking.send_signal(signal.SIGINT)
        said = baking.communicate(timeout=PATIENCE_SECONDS)[1]
    assert baking.returncode == 130, said
    assert "the same command again waits for it" in said
    assert "Traceback" not in said


async def test_a_refused_key_is_told(daytona: DaytonaDouble, capsys: pytest.CaptureFixture[str]) -> None:
    own = settings(daytona)
    daytona.key = "dtn_another"
    assert await bake.bake(own) == 1
    said = capsys.readouterr().out
    assert "not baked" in said
    assert own.api_key not in said
