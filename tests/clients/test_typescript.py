"""The TypeScript SDK, as npm serves it."""

from __future__ import annotations

import pytest

from tests.clients.contract import Client
from tests.clients.toolchains import INSTALL_SECONDS, typescript

pytestmark = pytest.mark.timeout(INSTALL_SECONDS)  # the first run installs


class TestTypeScript(Client):
    @pytest.fixture
    def command(self) -> list[str]:
        return typescript()
