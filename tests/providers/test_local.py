"""The contract on the local provider: in bubblewrap, and as plain processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract import CUSTOM_TOOLS, ProviderContract
from tests.providers.local_support import LOCAL, needs_bubblewrap


class LocalContract(ProviderContract):
    core = LOCAL
    isolation = "bubblewrap"

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        readable = [root.parent / "tools"]
        return LOCAL.sandbox.LocalProvider(
            root,
            isolation=self.isolation,
            keep_warm_seconds=settings.keep_warm_seconds,
            **{"readable": readable, **options},
        )

    async def runner_is_alive(self, sandbox: Any) -> bool:
        last_words: str = await sandbox.tail(1)
        return not ('"event": "sandbox"' in last_words and "ended with" in last_words)

    @pytest.fixture
    def tools_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "tools" / "my_tools.py"
        path.parent.mkdir()
        path.write_text(CUSTOM_TOOLS)
        return path


@needs_bubblewrap
class TestLocalContract(LocalContract):
    pass


class TestUnisolatedContract(LocalContract):
    isolation = "none"
    isolated = False
