"""`bake.py` against the double: it really installs what a sandbox of this deployment needs."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from vercel.sandbox import SnapshotSource

from tests.fakes.vercel import FakeVercel
from tests.fakes.vercel.api import TOKEN
from tests.folders import load_folder
from tests.providers.vercel_support import (
    IMAGE,
    SNAPSHOT,
    make_provider,
    needs_machines,
    open_client,
    start_vercel,
)
from tests.world import World
from tools.emulator import Emulator

VERCEL = load_folder("vercel")
LOCK = """
[[package]]
name = "anthropic"
version = "1.0"
dependencies = [
    { name = "small" },
    { name = "windows-only", marker = "sys_platform == 'win32'" },
    { name = "nearly-everywhere", marker = "sys_platform != 'emscripten'" },
]
wheels = [{ url = "u", hash = "sha256:aa" }, { url = "v", hash = "sha256:bb" }]
[[package]]
name = "small"
version = "2.0"
dependencies = [{ name = "anthropic" }]
sdist = { url = "u", hash = "sha256:cc" }
[[package]]
name = "nearly-everywhere"
version = "4.0"
[[package]]
name = "windows-only"
version = "3.0"
[[package]]
name = "of-the-host"
version = "5.0"
"""


def test_what_is_installed_is_what_the_runner_needs_exactly_and_by_hash() -> None:
    assert VERCEL.module("image").requirements(LOCK).splitlines() == [
        "anthropic==1.0 --hash=sha256:aa --hash=sha256:bb",
        "nearly-everywhere==4.0 ",
        "small==2.0 --hash=sha256:cc",
    ]


def test_a_change_of_the_runner_is_another_image_with_the_same_sdk(tmp_path: Path) -> None:
    (tmp_path / "_shared").mkdir()
    for path in [VERCEL.path / "uv.lock", VERCEL.path / "start.py", *(VERCEL.path / "_shared").glob("*.py")]:
        (tmp_path / path.relative_to(VERCEL.path)).write_bytes(path.read_bytes())
    (tmp_path / "_shared/runner_job.py").write_text("changed")
    changed = VERCEL.module("image").load(tmp_path)
    assert changed.sdk == IMAGE.sdk
    assert changed.runner != IMAGE.runner


def run_bake(fake: FakeVercel, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "bake.py", *arguments],
        cwd=VERCEL.path,
        env={"VERCEL_OIDC_TOKEN": TOKEN, "VERCEL_SANDBOX_API_URL": fake.url, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVercel]:
    with FakeVercel(tmp_path / "vercel") as fake:
        yield fake
        assert fake.refused == []


@needs_machines
class TestBake:
    async def test_a_sandbox_of_its_snapshot_serves_without_installing_anything(
        self, fake: FakeVercel, tmp_path: Path
    ) -> None:
        setup = tmp_path / "setup.sh"
        setup.write_text("echo from the set-up script > /etc/note\n")
        baked = run_bake(fake, "--setup", str(setup))
        assert baked.returncode == 0, baked.stderr
        (snapshot_id,) = fake.snapshots
        assert baked.stdout == f"VERCEL_SNAPSHOT_ID={snapshot_id}\n"
        assert [line.partition("s  ")[2] for line in baked.stderr.splitlines()] == [
            "starting a sandbox",
            "installing the SDK and the runner",
            f"running {setup} as root",
            "checking that a runner can work there",
            "taking the snapshot",
            "done",
        ]
        assert fake.sandboxes == {}

        def provider(root: Path, settings: Any, **options: Any) -> Any:
            return make_provider(fake, settings, snapshot_id=snapshot_id, allowed_hosts=(), **options)

        with Emulator() as emulator:
            world = World(emulator, VERCEL, provider, tmp_path)
            host = world.host()
            session = emulator.create_session()
            assert await host.ask(session, "!cat /etc/note; id -un; pwd") == "from the set-up script\nagent\n/workspace"
            await world.close()
        (sandbox,) = fake.sandboxes.values()
        policies = [sent for sent in fake.requests if sent.operation == "policy"]
        assert policies == []  # it was never open
        assert sandbox.network_policy == {"allow": {"127.0.0.1": []}}

    async def test_a_set_up_script_that_fails_makes_no_snapshot(self, tmp_path: Path) -> None:
        setup = tmp_path / "setup.sh"
        setup.write_text("echo no such package\nexit 3\n")
        with start_vercel(tmp_path / "vercel") as fake:  # what a runner needs is there already
            before = set(fake.snapshots)
            source = SnapshotSource(snapshot_id=SNAPSHOT)
            async with aclosing(open_client(fake)) as client, client.create_sandbox(source=source) as sandbox:
                with pytest.raises(VERCEL.shared("errors").LaunchFailed, match=r"setup\.sh ended with 3"):
                    await VERCEL.module("bake")._fill(sandbox, Namespace(setup=setup, days=0), IMAGE, 0.0)
            assert set(fake.snapshots) == before

    def test_a_set_up_script_that_is_not_there_is_refused_before_anything_starts(self, fake: FakeVercel) -> None:
        refused = run_bake(fake, "--setup", "missing.sh")
        assert refused.returncode == 2
        assert "missing.sh is no file" in refused.stderr
        assert fake.requests == []

    @pytest.mark.parametrize("days", ["0.5", "-3", "4000", "nan"])
    def test_days_that_vercel_does_not_take_are_refused_before_anything_starts(
        self, days: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            VERCEL.module("bake").main([f"--days={days}"])
        assert "--days is 1 to 3650, or 0" in capsys.readouterr().err

    def test_an_image_that_is_refused_names_the_settings(self, fake: FakeVercel) -> None:
        fake.fail("create", 400, "invalid_image")
        refused = run_bake(fake, "--image", "none")
        assert refused.returncode == 1
        assert "check VERCEL_SANDBOX_VCPUS, VERCEL_SANDBOX_IMAGE" in refused.stderr
        assert "(400 invalid_image)" in refused.stderr

    def test_credentials_that_are_refused_say_what_to_check(self, fake: FakeVercel) -> None:
        fake.fail("create", 403, "forbidden")
        refused = run_bake(fake)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert (
            "bake failed: Vercel forbids it: check the token, the team and the project (403 forbidden)"
            in refused.stderr
        )
        assert TOKEN not in refused.stderr
