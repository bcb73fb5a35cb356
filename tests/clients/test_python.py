"""The Python SDK in a process of its own."""

from __future__ import annotations

import sys

import pytest

from tests.clients.contract import Client
from tests.clients.toolchains import HERE


class TestPython(Client):
    @pytest.fixture
    def command(self) -> list[str]:
        return [sys.executable, str(HERE / "python" / "client.py")]
