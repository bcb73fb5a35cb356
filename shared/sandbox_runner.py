"""The runner: serves one session from inside its sandbox.

    python -I sandbox_runner.py < job.json      as our hosts start it
    python sandbox_runner.py                    in anybody's container, with the SDK's ANTHROPIC_* variables
    python sandbox_runner.py --check            proves that this image can run it

It takes only the `runner_*.py` files beside it along, and needs Python 3.11+ and the `anthropic` package. Its output is
one JSON object a line: ready, claimed, tool, retry, handover, exit. Exit codes: 0 done or not needed, 64 bad job,
69 cannot run here, 73 lock held, 76 lease lost, 143 handed over.

Order (R1): hide, read the job, take the lock, load the SDK, say ready, ack, claim, and only then serve. Until the ack
the item stays un-acked, so a runner that dies before it loses nothing: the item is offered again by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path: this directory is the package (PEP 366). At the end of the path, so that it shadows nothing.
    _here = Path(__file__).resolve().parent
    sys.path.append(str(_here.parent))
    __package__ = _here.name

from . import runner_process
from .runner_job import (
    EXIT_BAD_JOB,
    EXIT_CANNOT_RUN,
    EXIT_HANDED_OVER,
    EXIT_LOCK_HELD,
    EXIT_OK,
    BadJob,
    RunnerJob,
    read_job,
)
from .runner_lock import LeaseState, Lock, LockHeld, take_over


def emit(event: str, **values: object) -> None:
    """One line for the host. The host may be gone; the runner does not need it."""
    try:
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sandbox_runner.py", description=(__doc__ or "").split("\n\n")[0], epilog="The job is read from stdin."
    )
    parser.add_argument("--check", action="store_true", help="prove that the runner can work here, and exit (0 or 69)")
    parser.add_argument("--job-file", type=Path, metavar="PATH", help="read the job from PATH and remove it")
    options = parser.parse_args(arguments)
    if options.check:
        from .runner_check import check

        return check(emit, workdir(), state_directory())
    code, reason = _run(options.job_file)
    emit("exit", code=code, reason=reason)
    return code


def _run(job_file: Path | None) -> tuple[int, str]:
    runner_process.hide()
    runner_process.adopt_orphans()
    stdin = None if job_file or sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer
    try:
        job = read_job(job_file, stdin, os.environ)
    except BadJob as error:
        return EXIT_BAD_JOB, str(error)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        lock = Lock(state_directory())
    except OSError as error:
        return EXIT_CANNOT_RUN, f"SANDBOX_STATE_DIR cannot be used: {error.strerror}"
    try:
        return asyncio.run(_serve(job, lock))
    finally:
        lock.release()


async def _serve(job: RunnerJob, lock: Lock) -> tuple[int, str]:
    leaving = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leaving.set)

    async def probe() -> LeaseState | None:
        from .runner_claim import open_api, probe

        return await probe(open_api(job), job)

    taking = asyncio.create_task(take_over(lock, probe))
    told = asyncio.create_task(leaving.wait())
    await asyncio.wait([taking, told], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not taking.done():
        taking.cancel()
        return EXIT_HANDED_OVER, "told to leave while another runner held the lock"
    try:
        if not taking.result():
            return EXIT_OK, "a healthy runner serves this session already"
    except LockHeld as error:
        return EXIT_LOCK_HELD, str(error)

    # Only under the lock: the SDK takes seconds and some 80 MB to load, which two runners at once would pay twice.
    try:
        from .runner_session import Session
        from .runner_tools import load_custom_tools

        custom_tools = load_custom_tools(job.tools)
    except (ImportError, AttributeError, OSError) as error:
        return EXIT_CANNOT_RUN, f"{type(error).__name__}: {error}"
    session = Session(job, lock=lock, leaving=leaving, workdir=workdir(), emit=emit)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, session.leave)
    if leaving.is_set():
        return EXIT_HANDED_OVER, "told to leave before the claim"
    emit("ready")
    return await session.run(custom_tools)


def workdir() -> Path:
    """Where the agent works: SANDBOX_WORKDIR, else /workspace, else the current directory."""
    if named := os.environ.get("SANDBOX_WORKDIR"):
        return Path(named)
    return Path("/workspace") if Path("/workspace").is_dir() else Path.cwd()


def state_directory() -> Path:
    """Where the lock is: SANDBOX_STATE_DIR, else a directory of this user's under the system's temporary one."""
    if named := os.environ.get("SANDBOX_STATE_DIR"):
        return Path(named)
    return Path(tempfile.gettempdir()) / f"sandbox-runner-{os.getuid()}"


if __name__ == "__main__":
    sys.exit(main())
