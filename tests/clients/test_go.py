"""The Go SDK, as the module proxy serves it: what `ant beta:worker` is a command line for."""

from __future__ import annotations

import pytest

from tests.clients.contract import Client
from tests.clients.toolchains import INSTALL_SECONDS, golang

pytestmark = pytest.mark.timeout(INSTALL_SECONDS)  # the first run builds


class TestGo(Client):
    @pytest.fixture
    def command(self) -> list[str]:
        return golang()
