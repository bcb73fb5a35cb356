"""The hostile agent in the Vercel provider's sandboxes, as far as this project makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vercel import FakeVercel
from tests.providers.vercel_support import VERCEL, make_provider, needs_machines, start_vercel
from tests.redteam import RedTeam


@needs_machines
class TestVercelRedTeam(RedTeam):
    core = VERCEL
    provider = "vercel"
    fake: FakeVercel

    @pytest.fixture(autouse=True)
    def vercel(self, tmp_path: Path) -> Iterator[None]:
        with start_vercel(tmp_path / "vercel") as self.fake:
            yield
            assert self.fake.refused == []

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return make_provider(self.fake, settings, **options)
