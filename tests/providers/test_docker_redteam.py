"""The hostile agent in the Docker provider's sandboxes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.providers import docker_support as support
from tests.providers.docker_support import DOCKER, needs_docker
from tests.redteam import RedTeam


@needs_docker
class TestDockerRedTeam(RedTeam):
    core = DOCKER
    provider = "docker"

    @pytest.fixture(autouse=True)
    def _on_the_engine(self, tmp_path: Path) -> Iterator[None]:
        type(self).emulator_host = support.gateway()
        yield
        support.remove_all(support.namespace(tmp_path / "sandboxes"))

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        limits = DOCKER.module("containers").Limits(
            memory_mb=self.limits.memory_mb, pids=self.limits.pids, file_mb=self.limits.file_mb
        )
        return support.make_provider(root, settings, limits=limits, **options)
