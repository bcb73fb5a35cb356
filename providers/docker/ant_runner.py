"""The runner with DOCKER_RUNNER=ant: takes the job as ours does, then lets the vendor's `ant beta:worker run` serve it.

It is told on stdin, holds the sandbox's lock, and acks the item before `ant` starts: an item that could not be acked is
offered again, and nothing of it has run. From there on `ant` decides (the README says which rules that breaks). It
takes its credential in its environment only; the image's `ant` is a file that nobody may read, so the kernel hides that
from the agent, who has the same user, and `ant` starts its shell without it.

Output and exit codes are our runner's, with what `ant` says in between; 1 is `ant`'s own failure.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from _shared import runner_process
from _shared.runner_job import (
    EXIT_BAD_JOB,
    EXIT_CANNOT_RUN,
    EXIT_HANDED_OVER,
    EXIT_LEASE_LOST,
    EXIT_LOCK_HELD,
    EXIT_OK,
    BadJob,
    RunnerJob,
    read_job,
)
from _shared.runner_lock import Lock, LockHeld
from _shared.runner_secrets import guard_output
from _shared.sandbox_runner import emit, state_directory, take, workdir

ANT = Path("/opt/ant/ant")
_NO_CONFIG = "/opt/ant/none"  # `ant` would look for a profile in ~/.config, which the agent can write
_ACK_RETRIES = 3
_LEAST_IDLE_SECONDS = 0.01  # none at all would be no limit to it


def main() -> int:
    code, reason = _run()
    emit("exit", code=code, reason=reason)
    return code


def _run() -> tuple[int, str]:
    guard_output()
    runner_process.hide()
    runner_process.hear_signals()
    try:
        job = read_job(None, sys.stdin.buffer, os.environ)
    except BadJob as error:
        return EXIT_BAD_JOB, str(error)
    if not ANT.exists():
        return EXIT_CANNOT_RUN, "DOCKER_IMAGE holds no ant: build it with --build-arg ANT_VERSION=..."
    if os.access(ANT, os.R_OK):
        return EXIT_CANNOT_RUN, f"{ANT} can be read by its user, so the agent could read its environment: chmod 0711"
    try:
        lock = Lock(state_directory())
        if not asyncio.run(take(job, lock)):
            return EXIT_OK, "a healthy runner serves this session already"
    except LockHeld as error:
        return EXIT_LOCK_HELD, str(error)
    except OSError as error:
        return EXIT_CANNOT_RUN, f"the lock in SANDBOX_STATE_DIR cannot be used: {error.strerror}"
    emit("ready")
    if not _acked(job):
        return EXIT_LEASE_LOST, "the ack was refused or not answered"
    lock.say("claimed", None)  # so a newcomer asks the control plane whether the item is served
    return _serve(job)


def _acked(job: RunnerJob) -> bool:
    """In a process of its own, forked and so as hidden as this one: the 80 MB of the SDK go with it."""
    if not (child := os.fork()):
        os._exit(asyncio.run(_ack(job)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


async def _ack(job: RunnerJob) -> int:
    import anthropic

    from _shared.runner_claim import open_api

    async with open_api(job, max_retries=_ACK_RETRIES) as api:
        try:
            await api.beta.environments.work.ack(job.work_id, environment_id=job.environment_id)
        except anthropic.ConflictError:  # it is acked: by the poller that has called `on-work`
            return 0
        except anthropic.APIError:
            return 1
    return 0


def _serve(job: RunnerJob) -> tuple[int, str]:
    told = False
    ant: subprocess.Popen[bytes] | None = None

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if ant is not None:
            ant.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    idle = max(job.max_idle_seconds, _LEAST_IDLE_SECONDS)
    argv = [str(ANT), "beta:worker", "run", "--workdir", str(workdir()), "--max-idle", f"{idle:g}s"]
    try:
        ant = subprocess.Popen(argv, env={**os.environ, **_handed(job)}, stdin=subprocess.DEVNULL)
    except OSError as error:
        return EXIT_CANNOT_RUN, f"{ANT} cannot be started: {error.strerror}"
    if told:
        ant.terminate()
    code = ant.wait()
    if told:
        return EXIT_HANDED_OVER, "told to leave"
    return (EXIT_OK, "ant has ended") if code == 0 else (1, f"ant has ended with {code}")


def _handed(job: RunnerJob) -> dict[str, str]:
    """What `ant` takes the item from. Older versions know no secret of an item, but take its token for the key."""
    secret = {"ANTHROPIC_WORK_SECRET": job.secret} if job.secret else {}
    return secret | {
        "ANTHROPIC_SESSION_ID": job.session_id,
        "ANTHROPIC_WORK_ID": job.work_id,
        "ANTHROPIC_ENVIRONMENT_ID": job.environment_id,
        "ANTHROPIC_BASE_URL": job.base_url,
        "ANTHROPIC_ENVIRONMENT_KEY": job.token,
        "ANTHROPIC_CONFIG_DIR": _NO_CONFIG,
    }


if __name__ == "__main__":
    sys.exit(main())
