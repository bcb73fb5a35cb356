"""The hostile agent in the local provider's sandboxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.providers.local_support import LOCAL, needs_bubblewrap
from tests.redteam import RedTeam


@needs_bubblewrap
class TestLocalRedTeam(RedTeam):
    core = LOCAL
    provider = "local"

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        limits = self.limits
        return LOCAL.sandbox.LocalProvider(
            root, memory_mb=limits.memory_mb, pids=limits.pids, file_mb=limits.file_mb, **options
        )
