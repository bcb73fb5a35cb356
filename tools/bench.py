"""How the emulator carries many sessions: `make bench`, or `python -m tools.bench --sessions 2000`.

Every session has its message before the first worker comes, so the queue is as long as it gets. Then the SDK's own
workers, in a process of their own, serve them: claim, one tool call, idle, stop. The same is done before with fewer
sessions, in another process. The numbers are ratios, since machines differ: what a session costs among many compared
with among few, in processor time and in memory, and what it costs compared with a bare request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
from anthropic import AsyncAnthropic, beta_async_tool

from tools.emulator import Emulator, call, end, repeat_output
from tools.emulator import tools as step

ROOT = Path(__file__).parents[1]
WORKERS = 16
MAX_IDLE_SECONDS = 0.05
WARM_UP_SESSIONS = 20
FEWEST = 50
BARE_REQUESTS = 300
STALLED_SECONDS = 60.0
"""Without a session that ends for so long, the benchmark has failed."""
LOOK_SECONDS = 0.02
MOST_GROWTH = 1.5
"""What a session costs among ten times as many. Whatever looks at all of them for each of them is far above it."""


@dataclass(frozen=True)
class Outcome:
    sessions: int
    seconds: float
    cpu_seconds: float
    """Of the emulator's process, from the first worker to the last stop."""
    bare_cpu_seconds: float
    """What one `GET /v1/sessions/{id}` costs, its client in the same process included."""
    blocks: int
    """How many blocks of memory the sessions have left behind: steadier than bytes, which come by the page."""
    bytes: int
    requests: int
    refused: list[str]
    unfinished: int

    @property
    def cpu_per_session(self) -> float:
        return self.cpu_seconds / self.sessions

    def problems(self) -> list[str]:
        found = [f"{self.unfinished} sessions are not idle and stopped"] if self.unfinished else []
        return found + [f"not a 200: {each}" for each in sorted(set(self.refused))]


def run(sessions: int, workers: int = WORKERS, *, beside: int = 0, shows_progress: bool = False) -> Outcome:
    """Serve so many sessions, `beside` others that are over; RuntimeError when none ends for a minute."""
    with Emulator() as emulator:
        for _ in range(beside):
            emulator.stop_work(emulator.create_session(), force=True)
        before = _memory()
        emulator.default_script = [step(call("echo", text="hello")), repeat_output, end()]
        ids = [emulator.create_session() for _ in range(sessions)]
        bare = _bare_request(emulator, ids[0])
        for session_id in ids:
            emulator.say(session_id, "go")
        with _workers(emulator, workers) as process:
            served = _served(emulator, process)
            while next(served) == 0:  # the workers' process has started
                time.sleep(LOOK_SECONDS)
            began, cpu = time.monotonic(), time.process_time()
            while (so_far := next(served)) < sessions:
                time.sleep(LOOK_SECONDS)
                if shows_progress:
                    print(f"\r{so_far} of {sessions} sessions ", end="", file=sys.stderr, flush=True)
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        if shows_progress:
            print("\r" + " " * 40, end="\r", file=sys.stderr)
        log = emulator.requests[BARE_REQUESTS:]
        refused = [f"{each.operation} got {each.status}" for each in log if each.status != 200]
        done = sum(emulator.is_in(each, "idle") and emulator.is_in(each, "stopped") for each in ids)
        blocks, bytes_ = (after - then for after, then in zip(_memory(), before, strict=True))
        return Outcome(sessions, seconds, cpu, bare, blocks, bytes_, len(log), refused, sessions - done)


def _memory() -> tuple[int, int]:
    """Blocks and bytes in use now; where the system does not tell, the most bytes there have been."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return sys.getallocatedblocks(), int(statm.read_text().split()[1]) * resource.getpagesize()
    return sys.getallocatedblocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _bare_request(emulator: Emulator, session_id: str) -> float:
    headers = {"authorization": f"Bearer {emulator.api_key}", "anthropic-beta": "managed-agents-2026-04-01"}
    with httpx2.Client(base_url=emulator.url, headers=headers, trust_env=False) as http:
        before = time.process_time()
        for _ in range(BARE_REQUESTS):
            http.get(f"/v1/sessions/{session_id}").raise_for_status()
        return (time.process_time() - before) / BARE_REQUESTS


def _served(emulator: Emulator, process: subprocess.Popen[bytes]) -> Iterator[int]:
    """How many items have been stopped, whenever it is asked."""
    seen = stopped = 0
    last = time.monotonic()
    while True:
        fresh = emulator.requests[seen:]
        seen += len(fresh)
        ended = sum(each.operation == "work.stop" and each.status == 200 for each in fresh)
        stopped += ended
        last = time.monotonic() if ended else last
        if process.poll() is not None or time.monotonic() - last > STALLED_SECONDS:
            raise RuntimeError(f"it came to a halt after {stopped} sessions")
        yield stopped


@contextlib.contextmanager
def _workers(emulator: Emulator, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "tools.bench", "--work", "--workers", str(workers)]
    job = {"url": emulator.url, "environment": emulator.environment_id, "key": emulator.environment_key}
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None  # noqa: S101 - a pipe was asked for
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        try:
            yield process
        finally:
            process.terminate()


async def _work(job: dict[str, str], workers: int) -> None:
    """The other process: so many of the SDK's workers, until it is ended."""

    @beta_async_tool(name="echo")
    async def echo(text: str) -> str:
        """Say it again."""
        return text

    with tempfile.TemporaryDirectory() as workdir:
        async with AsyncAnthropic(base_url=job["url"], auth_token="none") as client:  # noqa: S106 - a worker brings its own
            serving = [
                client.beta.environments.work.worker(
                    environment_id=job["environment"],
                    environment_key=job["key"],
                    workdir=workdir,
                    tools=[echo],
                    max_idle=MAX_IDLE_SECONDS,
                )
                for _ in range(workers)
            ]
            await asyncio.gather(*(worker.run() for worker in serving))


def compare(few: Outcome, many: Outcome) -> list[str]:
    """What has gone wrong, in words."""
    found = few.problems() + many.problems()
    for what, ratio in (("processor time", cpu_growth(few, many)), ("memory", memory_growth(few, many))):
        if ratio > MOST_GROWTH:
            found.append(f"{what} of a session: {ratio:.2f} times what it is among {few.sessions}")
    return found


def cpu_growth(few: Outcome, many: Outcome) -> float:
    return many.cpu_per_session / few.cpu_per_session


def memory_growth(few: Outcome, many: Outcome) -> float:
    return (many.blocks / many.sessions) / (few.blocks / few.sessions)


def _run_alone(sessions: int, workers: int) -> Outcome:
    """In a process of its own, whose memory is that of these sessions."""
    argv = [sys.executable, "-m", "tools.bench", "--one", "--sessions", str(sessions), "--workers", str(workers)]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return Outcome(**json.loads(done.stdout))


def _tell(few: Outcome, many: Outcome) -> None:
    print(f"{many.sessions} sessions served and idle again, with {many.requests} requests")
    print(f"rate here: {many.sessions / many.seconds:.0f} sessions/s, workers included")
    for each in (few, many):
        bare = each.cpu_per_session / few.bare_cpu_seconds
        left = each.blocks / each.sessions
        print(
            f"among {each.sessions} a session costs as much as {bare:.1f} bare requests and leaves {left:.0f} objects"
        )
    print(f"in all: {many.bytes / 2**20:.0f} MiB")
    print(f"growth: {cpu_growth(few, many):.2f} in processor time, {memory_growth(few, many):.2f} in memory")


def main(arguments: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--sessions", type=int, default=2000, metavar="N", help="at least 100 (default: 2000)")
    flags.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"at once (default: {WORKERS})")
    flags.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = flags.parse_args(arguments)
    if options.work:
        asyncio.run(_work(json.load(sys.stdin), options.workers))
        return 0
    if options.one:
        run(WARM_UP_SESSIONS, options.workers)
        print(json.dumps(asdict(run(options.sessions, options.workers, shows_progress=sys.stderr.isatty()))))
        return 0
    if options.sessions < 100 or options.workers < 1:
        flags.error("--sessions is at least 100, --workers at least 1")
    few, many = (_run_alone(each, options.workers) for each in (max(FEWEST, options.sessions // 10), options.sessions))
    _tell(few, many)
    problems = compare(few, many)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
