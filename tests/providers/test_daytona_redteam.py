"""The hostile agent in the Daytona provider's sandboxes, as far as this project makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.daytona import DaytonaDouble
from tests.providers.daytona_support import FOLDER, account, provider
from tests.providers.local_support import needs_bubblewrap
from tests.redteam import RedTeam


@needs_bubblewrap
class TestDaytonaRedTeam(RedTeam):
    core = FOLDER
    provider = "daytona"
    daytona: DaytonaDouble

    @pytest.fixture(autouse=True)
    def account(self, tmp_path: Path) -> Iterator[None]:
        with account(tmp_path / "daytona") as self.daytona:
            yield

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return provider(self.daytona, settings, **options)
