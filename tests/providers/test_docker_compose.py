"""`compose.yaml`, as the README says to use it: from a directory that holds this folder only, with one command."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
import yaml

from tests.providers import docker_support as support
from tests.providers.docker_support import FOLDER, docker, needs_docker
from tools.emulator import Emulator

PATIENCE_SECONDS = 60.0


def _compose() -> list[str]:
    """The command: the plugin of today, or the program that Debian has."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    return ["docker", "compose"] if plugin else ["docker-compose"]


def _is_missing() -> bool:
    return support.PROBLEM is None and _compose() == ["docker-compose"] and not shutil.which("docker-compose")


needs_compose = pytest.mark.skipif(_is_missing() and not os.environ.get("CI"), reason="no docker compose")


@needs_docker
@needs_compose
def test_an_image_of_the_operators_own_is_run_and_never_built_over(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "compose.yaml", tmp_path)
    (tmp_path / ".env").write_text("DOCKER_IMAGE=my-toolchain:1\n", encoding="utf-8")
    environ = {key: value for key, value in os.environ.items() if key != "DOCKER_IMAGE"}
    done = subprocess.run([*_compose(), "config"], cwd=tmp_path, env=environ, capture_output=True, check=True)
    services = yaml.safe_load(done.stdout)["services"]
    assert services["image"]["image"] == "sandboxes-docker"
    assert services["worker"]["environment"]["DOCKER_IMAGE"] == "my-toolchain:1"
    assert "image" not in services["worker"]


@needs_docker
@needs_compose
@pytest.mark.timeout(240)
async def test_one_command_makes_a_worker_that_serves_and_may_go(tmp_path: Path) -> None:
    name = f"sandboxes-test-{uuid.uuid4().hex[:8]}"
    project = tmp_path / name
    shutil.copytree(FOLDER, project, ignore=shutil.ignore_patterns("__pycache__", ".*_cache", ".venv", ".env"))
    support.image()  # its layers are here then
    with Emulator(host=support.gateway()) as emulator:
        settings = {
            "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
            "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
            "ANTHROPIC_BASE_URL": emulator.url,
        }
        (project / ".env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()), encoding="utf-8")
        # A tag of this test's own: this machine may have a `sandboxes-docker`, and other tests run at once.
        (project / "test.yaml").write_text(f"services: {{image: {{image: {name}}}}}\n", encoding="utf-8")
        files = {"COMPOSE_FILE": "compose.yaml:test.yaml", "COMPOSE_PROJECT_NAME": name}
        base = {"BASE_IMAGE": found} if (found := support.base()) else {}
        environ = {**os.environ, **base, **files, "DOCKER_IMAGE": name}

        def compose(*arguments: str) -> None:
            done = subprocess.run(
                [*_compose(), *arguments], cwd=project, env=environ, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]

        is_up = True
        try:
            await asyncio.to_thread(compose, "up", "--build", "-d")
            session = emulator.create_session()
            emulator.say(session, "!echo the answer is $((6 * 7))")
            await asyncio.to_thread(emulator.wait_idle, session, PATIENCE_SECONDS)
            assert "the answer is 42" in str(emulator.events(session, "agent.message"))
            await asyncio.to_thread(compose, "down", "--rmi", "local")
            is_up = False
            running = docker("ps", "-q", "--filter", f"label=sandboxes.session={session}")
            assert running  # the worker is gone, its sandbox is not
        finally:
            if is_up:
                await asyncio.to_thread(compose, "down", "--rmi", "local")
            support.remove_all(emulator.environment_id)
            docker("rmi", "-f", name, check=False)
