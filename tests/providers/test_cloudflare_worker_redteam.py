"""The hostile agent in the Cloudflare Worker's sandboxes, in real workerd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.providers.workers_dev import WorkersDev, settings_for, workspace
from tests.redteam import FileRedTeam
from tests.redteam.file_suite import LIMIT_MB
from tools.emulator import Emulator

FILES_KEY = "a-password-of-our-choice"

pytestmark = pytest.mark.timeout(300)  # the first test of a process may install


class Deployment:
    def __init__(self, emulator: Emulator, dev: WorkersDev) -> None:
        self.emulator, self._dev = emulator, dev
        self.secrets = ("sk-ant-", "whsec_", emulator.environment_key, emulator.webhook_key, FILES_KEY, "ANTHROPIC_")

    def log(self) -> str:
        return self._dev.log

    def get(self, session: str, path: str = "", *, key: str | None = "") -> tuple[int, dict[str, str], bytes]:
        headers = {} if key is None else {"authorization": f"Bearer {key or FILES_KEY}".strip()}
        answer = self._dev.request("GET", f"/sessions/{session}/files{path}", headers=headers)
        return answer.status_code, dict(answer.headers), answer.content


class TestCloudflareWorkerRedTeam(FileRedTeam):
    provider = "cloudflare-worker"

    @pytest.fixture
    def host(self, tmp_path: Path) -> Iterator[Deployment]:
        with Emulator() as emulator:
            more = {"FILES_KEY": FILES_KEY, "FILES_MAX_MB": str(LIMIT_MB)}
            with WorkersDev(workspace("cloudflare-worker"), tmp_path, settings_for(emulator, **more)) as dev:
                emulator.set_webhook_url(f"{dev.url}/webhook")
                yield Deployment(emulator, dev)
