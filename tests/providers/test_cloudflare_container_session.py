"""providers/cloudflare-container/src/session_object.ts: what it does as time passes, in Node on a clock that is set.

Minutes of a slow restore or of a save that is refused would be minutes under `wrangler dev` too.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.providers.workers_dev import workspace
from tools import typescript

HERE = Path(__file__).parent
SCHEDULES = ("PROVIDER_SCHEDULES_N", "PROVIDER_SCHEDULES_SEED")


@pytest.mark.timeout(300)  # the first test of a process may install
@pytest.mark.parametrize("program", ["cloudflare_container_session.mts", "cloudflare_container_schedules.mts"])
def test_a_sessions_object_as_time_passes(program: str) -> None:
    """The schedules play more seeds with PROVIDER_SCHEDULES_N, and begin elsewhere with PROVIDER_SCHEDULES_SEED."""
    argv = [str(typescript.node()), "--experimental-strip-types", "--no-warnings", "--test", str(HERE / program)]
    chosen = {name: os.environ[name] for name in SCHEDULES if name in os.environ}
    done = subprocess.run(
        argv,
        cwd=workspace("cloudflare-container"),
        env=typescript.environment() | chosen,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
