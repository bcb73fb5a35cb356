"""The contract on the Docker provider, on a real Engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import ProviderContract
from tests.providers import docker_support as support
from tests.providers.docker_support import DOCKER, TOOLS_FILE, needs_docker


@needs_docker
class TestDockerContract(ProviderContract):
    core = DOCKER

    @pytest.fixture(autouse=True)
    def _on_the_engine(self, tmp_path: Path) -> Iterator[None]:
        type(self).emulator_host = support.gateway()
        yield
        support.remove_all(support.namespace(tmp_path / "sandboxes"))

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        if settings.tools == f"{TOOLS_FILE}:tools":
            options["image"] = support.image_with_tools()
        return support.make_provider(root, settings, **options)

    async def runner_is_alive(self, sandbox: Any) -> bool:
        last_words: str = await sandbox.tail(1)
        return not ('"event": "sandbox"' in last_words and "ended with" in last_words)

    @pytest.fixture
    def tools_file(self) -> Path:
        return Path(TOOLS_FILE)
