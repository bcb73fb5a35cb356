"""The runner: serves one session from inside its sandbox.

    python -I sandbox_runner.py < job.json      as our hosts start it
    python sandbox_runner.py                    in anybody's container, with the SDK's ANTHROPIC_* variables
    python sandbox_runner.py --check            proves that this image can run it

It takes only the `runner_*.py` files beside it along, and needs Python 3.11+ and the `anthropic` package. Its output is
one JSON object a line: ready, claimed, tool, retry, handover, exit. Exit codes: 0 done or not needed, 64 bad job,
69 cannot run here, 73 lock held, 76 lease lost, 143 handed over.

Order (R1): hide, read the job, take the lock, load the SDK, say ready, ack, claim, and only then serve. Until the ack
the item stays un-acked, so a runner that dies before it loses nothing: the item is offered again by itself. Nothing of
the agent's decides what is loaded: `-I` keeps its directory, its home and its variables out, and this file adds no
directory to the path.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import select
import signal
import sys
import tempfile
from pathlib import Path
from types import ModuleType

if __name__ == "__main__" and not __package__:
    # Run by path: this directory is a package (PEP 366), by itself and not through the path.
    __package__ = "sandbox_runner_files"
    sys.modules[__package__] = ModuleType(__package__)
    sys.modules[__package__].__path__ = [str(Path(__file__).resolve().parent)]

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
from .runner_lock import LeaseState, Lock, LockHeld, open_to_us, take_over
from .runner_secrets import RedactingFormatter, guard_output, redact

_REAP_SECONDS = 60.0
_SIGNAL_SECONDS = 0.01
_LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def emit(event: str, **values: object) -> None:
    """One line for the host. The host may be gone, or not reading: the runner does not need it, and does not wait."""
    if sys.stdout is None:
        return
    look = select.poll()
    try:
        look.register(sys.stdout, select.POLLOUT)
        if look.poll(0):
            sys.stdout.write(redact(json.dumps({"event": event, **values})) + "\n")
            sys.stdout.flush()
    except OSError:
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
    _log_to_stderr()
    try:
        runner_process.hide()
    except OSError as error:
        return EXIT_CANNOT_RUN, f"the runner cannot be hidden from the agent's shell: {error.strerror}"
    runner_process.OomDescent().install()
    runner_process.adopt_orphans()
    runner_process.hear_signals()
    stdin = None if job_file or sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer
    try:
        job = read_job(job_file, stdin, os.environ)
    except BadJob as error:
        return EXIT_BAD_JOB, str(error)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        workdir().mkdir(parents=True, exist_ok=True)
        open_to_us(workdir())
    except OSError as error:
        return EXIT_CANNOT_RUN, f"SANDBOX_WORKDIR cannot be used: {error.strerror}"
    try:
        lock = Lock(state_directory())
    except OSError as error:
        return EXIT_CANNOT_RUN, f"SANDBOX_STATE_DIR cannot be used: {error.strerror}"
    # Not `asyncio.run`: at its end it would wait for what the runner has given up waiting for.
    return asyncio.new_event_loop().run_until_complete(_serve(job, lock))


def _log_to_stderr() -> None:
    """What the SDK, a custom tool or Python itself has to say goes to the runner's log too, without secrets."""
    guard_output()
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)


async def _serve(job: RunnerJob, lock: Lock) -> tuple[int, str]:
    loop = asyncio.get_running_loop()
    leaving = asyncio.Event()
    for number in _LEAVE_SIGNALS:
        loop.add_signal_handler(number, leaving.set)
    taking = asyncio.create_task(take(job, lock))
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
    except OSError as error:
        return EXIT_CANNOT_RUN, f"the lock in SANDBOX_STATE_DIR cannot be used: {error.strerror}"

    # Only under the lock: the SDK takes seconds and some 80 MB to load, which two runners at once would pay twice. What
    # is made then stays; a fifth of the time would go into looking for garbage among it.
    gc.disable()
    try:
        from .runner_session import Session
        from .runner_tools import load_custom_tools

        custom_tools = load_custom_tools(job.tools)
    except (ImportError, SyntaxError, AttributeError, OSError) as error:
        return EXIT_CANNOT_RUN, f"{type(error).__name__}: {error}"
    finally:
        gc.freeze()
        gc.enable()
    kill = runner_process.kill_descendants
    session = Session(
        job, lock=lock, leaving=leaving, workdir=workdir(), emit=emit, kill=kill, mark=runner_process.mark
    )
    for number in _LEAVE_SIGNALS:
        loop.add_signal_handler(number, session.leave)
    # A signal that came while the SDK was loading waits for the loop, which did not run meanwhile: let it. To leave now
    # loses nothing, the item is un-acked.
    await asyncio.sleep(_SIGNAL_SECONDS)
    if leaving.is_set():
        return EXIT_HANDED_OVER, "told to leave before the ack"
    emit("ready")
    reaper = asyncio.create_task(_reap_for_ever())
    try:
        return await session.run(custom_tools)
    finally:
        reaper.cancel()


async def take(job: RunnerJob, lock: Lock) -> bool:
    """R3. False: a healthy runner serves the item. The probe loads the SDK only when there is somebody to ask about."""
    if lock.try_take():
        return True

    async def ask() -> LeaseState | None:
        from .runner_claim import open_api, probe

        async with open_api(job) as api:
            return await probe(api, job)

    return await take_over(lock, ask)


async def _reap_for_ever() -> None:
    reaper = runner_process.OrphanReaper()
    while True:
        reaper.reap()
        await asyncio.sleep(_REAP_SECONDS)


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
    # A sync custom tool that was left behind runs on a thread: an ordinary exit would wait for it.
    os._exit(main())
