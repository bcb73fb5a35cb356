"""The hostile agent in the image of providers/cloudflare-container."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.containers.engine import ImageProvider
from tests.providers.docker_support import docker, gateway, image, needs_docker
from tests.redteam import RedTeam
from tests.world import SharedCore
from tools.sync_shared import ROOT


@needs_docker
class TestCloudflareContainerRedTeam(RedTeam):
    core = SharedCore()
    provider = "cloudflare-container"
    prefix = ""

    @pytest.fixture(autouse=True)
    def _on_the_engine(self) -> Iterator[None]:
        type(self).emulator_host = gateway()
        type(self).prefix = f"test-{uuid.uuid4().hex[:12]}"
        yield
        if found := docker("ps", "-aq", "--filter", f"name={self.prefix}").split():
            docker("rm", "-f", *found, check=False)

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        memory = f"{self.limits.memory_mb}m"
        return ImageProvider(
            image(ROOT / "providers/cloudflare-container/container"),
            self.prefix,
            *("--memory", memory, "--memory-swap", memory),
        )
