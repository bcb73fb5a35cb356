"""Fault schedules on the Docker provider, on a real Engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.provider_schedules import ProviderSchedules, Scene, Trouble
from tests.providers import docker_support as support
from tests.providers.docker_support import DOCKER, docker, needs_docker

# The suite's calls report to the emulator by a connection of their own. From in here that is a request to the proxy.
_PROXY = ("127.0.0.1", 3128)


@needs_docker
@pytest.mark.timeout(300)
class TestDockerSchedules(ProviderSchedules):
    core = DOCKER
    seeds: ClassVar[int] = 2
    patience: ClassVar[float] = 200.0  # containers are made and ended in seconds where others need none
    launches_take_seconds: ClassVar[bool] = True

    @pytest.fixture(autouse=True)
    def _on_the_engine(self, tmp_path: Path) -> Iterator[None]:
        type(self).emulator_host = support.gateway()
        support.image()  # made before the schedule's time begins
        self._namespace = support.namespace(tmp_path / "sandboxes")
        yield
        support.remove_all(self._namespace)

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return support.make_provider(root, settings, **{"grace_seconds": 5, **options})

    def troubles(self) -> list[Trouble]:
        return [
            Trouble("the container is killed in a call", self._container_killed),
            Trouble("the container is removed in a call", self._container_removed),
            Trouble("the container is stopped in a call", self._container_stopped),
            Trouble("the egress proxy is killed", self._proxy_killed),
            Trouble("the Engine does not answer for a moment", self._engine_away),
            Trouble("containers are made and not started", self._half_made),
        ]

    def _command(self, scene: Scene, session: str, call: str, seconds: float) -> str:
        command = super()._command(scene, session, call, seconds)
        api = scene.world.base_url
        address = re.escape(f"/dev/tcp/{api.removeprefix('http://').replace(':', '/')}")
        command, count = re.subn(address, "/dev/tcp/{}/{}".format(*_PROXY), command)
        assert count == 1
        return command.replace("POST /_emulator/", f"POST {api}/_emulator/")

    async def _container_killed(self, scene: Scene) -> None:
        if session := await scene.until_in_a_call():
            docker("kill", self._name(session), check=False)

    async def _container_removed(self, scene: Scene) -> None:
        if session := await scene.until_in_a_call():
            docker("rm", "-f", self._name(session), check=False)

    async def _container_stopped(self, scene: Scene) -> None:
        if session := await scene.until_in_a_call():
            docker("stop", self._name(session), check=False)

    async def _proxy_killed(self, scene: Scene) -> None:
        docker("kill", f"sandbox-egress-{self._namespace}", check=False)

    async def _engine_away(self, scene: Scene) -> None:
        engine = scene.host.provider._engine
        url, engine._url = engine._url, "unix:///nowhere/docker.sock"
        await engine.close()
        try:
            await scene.host.dispatcher.drain()
        finally:
            engine._url = url
            await engine.close()

    async def _half_made(self, scene: Scene) -> None:
        for session in scene.sessions:
            labels = {
                "sandboxes.environment": self._namespace,
                "sandboxes.session": session,
                "sandboxes.part": "sandbox",
            }
            options = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
            docker("create", "--name", self._name(session), *options, support.image(), check=False)

    def _name(self, session: str) -> str:
        return f"sandbox-{self._namespace}-{session}"

    async def leftovers(self, scene: Scene) -> list[str]:
        label = f"label=sandboxes.environment={self._namespace}"
        found = docker("ps", "-a", "--filter", label, "--format", "{{.Names}}").split()
        found += docker("volume", "ls", "-q", "--filter", label).split()
        return [name for name in found if not name.startswith("sandbox-egress-")]
