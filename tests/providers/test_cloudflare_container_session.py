"""providers/cloudflare-container/src/session_object.ts: what it does as time passes, in Node on a clock that is set.

Minutes of a slow restore or of a save that is refused would be minutes under `wrangler dev` too.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.providers.workers_dev import workspace
from tools import typescript

PROGRAM = Path(__file__).with_name("cloudflare_container_session.mts")


@pytest.mark.timeout(300)  # the first test of a process may install
def test_a_sessions_object_as_time_passes() -> None:
    argv = [str(typescript.node()), "--experimental-strip-types", "--no-warnings", "--test", str(PROGRAM)]
    done = subprocess.run(
        argv,
        cwd=workspace("cloudflare-container"),
        env=typescript.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
