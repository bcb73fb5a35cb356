"""A runner as the public recipes have it, and worse: the attempts must succeed against it, or they prove nothing.

The job is in its environment, its arguments, its memory, a file beside the working directory and an open descriptor.
Nothing hides it; its code lies in the working directory, which also comes first on its path; it ends nothing that the
agent leaves. It serves with the SDK's own worker.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

_PR_SET_PTRACER, _ANY = 0x59616D61, -1


def become_careless() -> None:
    """Starts again: a copy in the working directory, without -I, with everything where it can be seen."""
    job = sys.stdin.read()
    workspace = Path(os.environ["SANDBOX_WORKDIR"])
    copy = workspace / "careless_runner.py"
    shutil.copy(__file__, copy)
    kept = workspace.parent / "job.json"
    kept.write_text(job)
    os.set_inheritable(os.open(kept, os.O_RDONLY), True)
    os.chdir(workspace)
    values = {**os.environ, **json.loads(job)}
    os.execve(sys.executable, [sys.executable, str(copy), values["ANTHROPIC_WORK_SECRET"]], values)  # noqa: S606


async def serve() -> None:
    from anthropic import AsyncAnthropic
    from anthropic.lib.environments import EnvironmentWorker

    work_id, environment_id = os.environ["ANTHROPIC_WORK_ID"], os.environ["ANTHROPIC_ENVIRONMENT_ID"]
    async with AsyncAnthropic(auth_token=token()) as client:
        await client.beta.environments.work.ack(work_id, environment_id=environment_id)
        await EnvironmentWorker(client, workdir=os.environ["SANDBOX_WORKDIR"], max_idle=1.0).handle_item()


def token() -> str:
    import base64

    secret = os.environ["ANTHROPIC_WORK_SECRET"]
    return str(json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))["sessions_token"])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        become_careless()
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(_ANY), 0, 0, 0)
    import asyncio

    sys.stdout.write(json.dumps({"event": "ready"}) + "\n")
    sys.stdout.flush()
    asyncio.run(serve())
