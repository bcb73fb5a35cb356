"""The contract on Daytona: the vendor's real client against the double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import CUSTOM_TOOLS, ProviderContract
from tests.fakes.daytona import DaytonaDouble
from tests.providers.daytona_support import FOLDER, account, provider
from tests.providers.local_support import needs_bubblewrap


@needs_bubblewrap
class TestDaytonaContract(ProviderContract):
    core = FOLDER
    daytona: DaytonaDouble

    @pytest.fixture(autouse=True)
    def account(self, tmp_path: Path) -> Iterator[None]:
        with account(tmp_path / "daytona") as self.daytona:
            self.daytona.readable.append(tmp_path / "tools")
            yield

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return provider(self.daytona, settings, **options)

    def let_keep_warm_pass(self) -> None:
        self.daytona.minute = 0.05  # the shortest interval is five of them

    async def runner_is_alive(self, sandbox: Any) -> bool:
        (session,) = [each for each in await sandbox._sandbox.process.list_sessions() if each.commands]
        return session.commands[0].exit_code is None

    @pytest.fixture
    def tools_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "tools" / "my_tools.py"
        path.parent.mkdir()
        path.write_text(CUSTOM_TOOLS)
        return path
