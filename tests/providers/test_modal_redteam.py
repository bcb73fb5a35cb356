"""The hostile agent in the Modal provider's sandboxes, as far as the double is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.modal import ModalDouble
from tests.providers.modal_support import MODAL, image, needs_bubblewrap, open_provider
from tests.redteam import RedTeam


@needs_bubblewrap
class TestModalRedTeam(RedTeam):
    core = MODAL
    provider = "modal"

    @pytest.fixture(autouse=True)
    def _on_the_double(self) -> Iterator[None]:
        with ModalDouble() as double:
            self._double = double
            self._image = image(double)
            yield

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return open_provider(self._double, self._image, settings, **options)
