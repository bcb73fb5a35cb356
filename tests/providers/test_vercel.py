"""The contract on the Vercel provider: Vercel's real SDK against the double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import CUSTOM_TOOLS, ProviderContract
from tests.fakes.vercel import FakeVercel
from tests.providers.vercel_support import VERCEL, make_provider, needs_machines, start_vercel


@needs_machines
class TestVercelContract(ProviderContract):
    core = VERCEL

    @pytest.fixture(autouse=True)
    def vercel(self, tmp_path: Path) -> Iterator[FakeVercel]:
        with start_vercel(tmp_path / "vercel", shown=(tmp_path / "tools",)) as fake:
            self.fake = fake
            yield fake
            assert fake.refused == []

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        program = str(options.pop("runner")) if "runner" in options else None
        return make_provider(self.fake, settings, program=program, **options)

    async def runner_is_alive(self, sandbox: Any) -> bool:
        return bool(self.fake.running_commands(sandbox.id))

    @pytest.fixture
    def tools_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "tools" / "my_tools.py"
        path.parent.mkdir()
        path.write_text(CUSTOM_TOOLS)
        return path
