"""The contract on the Modal provider: Modal's real client, against the double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import CUSTOM_TOOLS, ProviderContract
from tests.fakes.modal import ModalDouble
from tests.providers.modal_support import MODAL, image, needs_bubblewrap, open_provider


@needs_bubblewrap
class TestModalContract(ProviderContract):
    core = MODAL

    @pytest.fixture(autouse=True)
    def double(self, tmp_path: Path) -> Iterator[ModalDouble]:
        with ModalDouble() as double:
            self._double = double
            tools = tmp_path / "my_tools.py"
            tools.write_text(CUSTOM_TOOLS)
            self._image = image(double, {"/opt/tools/my_tools.py": tools})
            yield double
            assert double.wire.refused == []

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return open_provider(self._double, self._image, settings, **options)

    async def runner_is_alive(self, sandbox: Any) -> bool:
        return any(not each.is_idle() for each in self._double.running())

    @pytest.fixture
    def tools_file(self) -> Path:
        return Path("/opt/tools/my_tools.py")
