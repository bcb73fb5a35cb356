"""R3: one runner per sandbox, and how a newcomer takes over. The holders are real processes with the real lock."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.runner_answers import LOST
from shared.runner_claim import open_api, probe
from shared.runner_job import EXIT_LEASE_LOST, EXIT_OK, parse_job
from shared.runner_lock import Holder, LeaseState, Lock, LockHeld, take_over
from tests.runner.support import (
    Start,
    eventually,
    in_process,
    is_alive,
    job_values,
    operations,
    texts,
    until,
    wait_file,
    wait_idle,
)
from tools.emulator import Emulator, Switches

ROOT = Path(__file__).resolve().parents[2]
BEAT = "2026-11-23T10:00:00.000000Z"
QUEUED = LeaseState("queued", None)
ACTIVE = LeaseState("active", BEAT)
HOLD = """
import os, signal, subprocess, sys, time
sys.path.append(sys.argv[1])
from shared.runner_lock import Lock
from pathlib import Path
lock = Lock(Path(sys.argv[2]))
assert lock.try_take()
if sys.argv[3] != "loading":
    lock.say(sys.argv[3], sys.argv[4])
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "parent" in sys.argv:
    print(subprocess.Popen(["/bin/sleep", "300"], start_new_session=True).pid, flush=True)
print("held", flush=True)
time.sleep(300)
"""

Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts a process that holds the lock of `tmp_path`."""
    with contextlib.ExitStack() as stack:

        def start(phase: str, *how: str, heartbeat: str = BEAT) -> subprocess.Popen[str]:
            argv = [sys.executable, "-I", "-c", HOLD, str(ROOT), str(tmp_path), phase, heartbeat, *how]
            holder = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
            stack.callback(holder.kill)
            assert holder.stdout is not None
            if "parent" not in how:
                assert holder.stdout.readline() == "held\n"
            return holder

        yield start


def answering(*states: LeaseState | None) -> Callable[[], Any]:
    """A control plane that gives these answers in turn, and then the last one."""
    answers = iter(states)
    last: list[LeaseState | None] = [None]

    async def ask() -> LeaseState | None:
        last[0] = next(answers, last[0])
        return last[0]

    return ask


async def never() -> LeaseState | None:
    raise AssertionError("the control plane was asked")


async def stopped(pid: int) -> None:
    """Stops the process, and waits until it is: of two pending signals the kernel delivers SIGTERM first."""
    os.kill(pid, signal.SIGSTOP)
    await eventually(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())


async def test_a_free_lock_is_taken_without_a_question(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    assert await take_over(lock, never)
    assert json.loads((tmp_path / "runner.lock").read_text()) == {
        "phase": "loading",
        "pid": os.getpid(),
        "last_heartbeat": None,
    }
    lock.release()


async def test_a_healthy_holder_means_there_is_nothing_to_do(hold: Hold, tmp_path: Path) -> None:
    holder = hold("claimed")
    assert not await take_over(Lock(tmp_path), answering(ACTIVE))
    assert holder.poll() is None


async def test_a_loading_holder_is_waited_for_and_never_signalled(hold: Hold, tmp_path: Path) -> None:
    holder = hold("loading")
    with pytest.raises(LockHeld):
        await take_over(Lock(tmp_path), never, wait_seconds=0.5, grace_seconds=0)
    assert holder.poll() is None


async def test_a_holder_that_is_gone_leaves_a_free_lock(hold: Hold, tmp_path: Path) -> None:
    holder = hold("claimed")
    holder.kill()
    holder.wait()
    lock = Lock(tmp_path)
    assert await take_over(lock, never)
    assert lock.holder() is None  # it is ours, and we do not signal ourselves
    lock.release()


@pytest.mark.parametrize("lease", [None, LeaseState("active", "another's"), LeaseState("stopped", BEAT)])
async def test_a_holder_of_unclear_health_is_waited_for(hold: Hold, tmp_path: Path, lease: LeaseState | None) -> None:
    holder = hold("claimed")
    with pytest.raises(LockHeld, match=r"for 0\.5 s"):
        await take_over(Lock(tmp_path), answering(lease), wait_seconds=0.5, grace_seconds=0, probe_seconds=0)
    assert holder.poll() is None


async def test_a_leaving_holder_is_not_taken_for_a_healthy_one(hold: Hold, tmp_path: Path) -> None:
    holder = hold("leaving")
    taking = asyncio.create_task(take_over(Lock(tmp_path), answering(ACTIVE), probe_seconds=0))
    await asyncio.wait([taking], timeout=0.5)
    assert not taking.done()
    assert holder.poll() is None
    holder.kill()
    assert await taking


@pytest.mark.parametrize("phase", ["claimed", "leaving"])
async def test_a_holder_whose_item_is_queued_again_is_told_to_leave(hold: Hold, tmp_path: Path, phase: str) -> None:
    holder = hold(phase)
    assert await take_over(Lock(tmp_path), answering(None, QUEUED), probe_seconds=0)
    assert holder.wait() == -signal.SIGTERM


async def test_a_holder_that_the_agent_has_stopped_goes_on_and_leaves_at_once(hold: Hold, tmp_path: Path) -> None:
    holder = hold("claimed")
    await stopped(holder.pid)
    assert await take_over(Lock(tmp_path), answering(QUEUED))
    assert holder.wait() == -signal.SIGTERM  # not SIGKILL: a real one saves what it has


async def test_a_hung_holder_is_killed_with_its_tree_after_the_grace(hold: Hold, tmp_path: Path) -> None:
    holder = hold("claimed", "deaf", "parent")
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    assert holder.stdout.readline() == "held\n"
    began = time.monotonic()
    assert await take_over(Lock(tmp_path), answering(QUEUED), grace_seconds=1.0)
    assert time.monotonic() - began >= 1.0  # not before the grace is over
    assert holder.wait() == -signal.SIGKILL
    assert not is_alive(child)


async def test_who_was_told_and_holds_the_lock_no_more_is_not_killed(hold: Hold, tmp_path: Path) -> None:
    told = hold("claimed", "deaf")
    other = await asyncio.create_subprocess_exec("/bin/sleep", "300")
    asked = 0

    async def ask() -> LeaseState:
        nonlocal asked
        asked += 1
        if asked == 2:  # long before the grace is over
            record = {"phase": "claimed", "pid": other.pid, "last_heartbeat": BEAT}
            (tmp_path / "runner.lock").write_text(json.dumps(record))
        return QUEUED

    with pytest.raises(LockHeld):
        await take_over(Lock(tmp_path), ask, wait_seconds=3.0, grace_seconds=1.5, probe_seconds=0.2)
    assert asked > 2
    assert [told.poll(), other.returncode] == [None, None]
    other.kill()
    await other.wait()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"[" * 512,
        b'{"phase": "claimed"}',
        b'{"phase": "asleep", "pid": 4242, "last_heartbeat": null}',
        *(b'{"phase": "claimed", "pid": %s, "last_heartbeat": null}' % pid for pid in (b"-1", b"0", b"1", b"true")),
        b'{"phase": "claimed", "pid": OURS, "last_heartbeat": null}',
    ],
)
async def test_a_record_that_names_nobody_gets_nobody_signalled(tmp_path: Path, content: bytes) -> None:
    """The agent can write it, and kill(-1) would reach every process of the user."""
    held = os.open(tmp_path / "runner.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.write(held, content.replace(b"OURS", str(os.getpid()).encode()))
    lock = Lock(tmp_path)
    assert lock.holder() is None
    with pytest.raises(LockHeld):
        await take_over(lock, never, wait_seconds=0.01, grace_seconds=0)
    os.close(held)


@pytest.mark.parametrize("what", ["directory", "pipe", "link", "state"])
def test_what_is_no_lock_is_moved_aside(tmp_path: Path, what: str) -> None:
    directory = tmp_path / "state"
    path = directory / "runner.lock"
    bystander = tmp_path / "bystander"
    bystander.write_text("precious")
    if what == "state":
        directory.touch()
    else:
        directory.mkdir()
    if what == "directory":
        (path / "not" / "empty").mkdir(parents=True)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(bystander)
    lock = Lock(directory)
    assert lock.try_take()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert bystander.read_text() == "precious"
    lock.release()


def test_a_lock_that_is_held_is_not_moved_aside(hold: Hold, tmp_path: Path) -> None:
    hold("claimed")
    (tmp_path / "runner.lock").chmod(0)
    tmp_path.chmod(0)
    assert not Lock(tmp_path).try_take()
    assert os.listdir(tmp_path) == ["runner.lock"]


def test_what_a_dead_holder_or_the_agent_wrote_is_not_said_of_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "runner.lock").write_bytes(b"x" * 4096)
    lock = Lock(tmp_path)
    assert lock.try_take()
    assert json.loads((tmp_path / "runner.lock").read_text())["phase"] == "loading"
    lock.say("claimed", BEAT)
    lock.say("leaving", None)
    assert json.loads((tmp_path / "runner.lock").read_text())["phase"] == "leaving"
    lock.release()


def test_a_holder_reads_as_it_was_said(hold: Hold, tmp_path: Path) -> None:
    holder = hold("claimed")
    assert Lock(tmp_path).holder() == Holder("claimed", holder.pid, BEAT)


def test_a_symlink_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text('{"phase": "claimed", "pid": 4242, "last_heartbeat": null}')
    (tmp_path / "runner.lock").symlink_to(tmp_path / "target")
    assert Lock(tmp_path).holder() is None


@pytest.mark.parametrize("switches", [Switches(heartbeat_on_queued=status) for status in (412, 404, 409)])
async def test_the_probe_reads_the_lease_and_leaves_it_alone(emulator: Emulator, tmp_path: Path) -> None:
    session_id = emulator.create_session()
    job = parse_job(await job_values(emulator, emulator.url))
    async with open_api(job) as api:
        assert await probe(api, job) == QUEUED
        runner = await in_process(emulator, emulator.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="30")
        serving = runner.start()
        await until(emulator, lambda: emulator.work(session_id)["state"] == "active")
        before = emulator.work(session_id)["latest_heartbeat_at"]
        seen = await probe(api, job)
        assert seen is not None
        assert seen.state == "active"
        emulator.stop_work(session_id)
        assert (await probe(api, job)) in (LeaseState("stopping", before), LeaseState("stopping", seen.last_heartbeat))
        runner.session.leave()
        await serving
        emulator.delete_session(session_id)
        assert await probe(api, job) == QUEUED  # 404, and the newcomer's ack will say so
    unreachable = parse_job(
        {
            "ANTHROPIC_SESSION_ID": "s",
            "ANTHROPIC_WORK_ID": "w",
            "ANTHROPIC_ENVIRONMENT_ID": "e",
            "ANTHROPIC_ENVIRONMENT_KEY": "k",
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:9",
        }
    )
    async with open_api(unreachable) as api:
        assert await probe(api, unreachable) is None


@pytest.fixture
async def pair(emulator: Emulator, start: Start) -> tuple[str, Any, dict[str, str]]:
    """A session, its serving runner, and a second job for the same hand-out."""
    session_id = emulator.create_session()
    second = await job_values(emulator, emulator.url)
    first = await start(await job_values(emulator, emulator.url, SANDBOX_MAX_IDLE_SECONDS="60"))
    await first.line("claimed")
    return session_id, first, second


async def test_the_second_of_two_runners_is_not_needed(emulator: Emulator, start: Start, pair: Any) -> None:
    session_id, first, job = pair
    second = await start(job)
    assert await second.exit() == (EXIT_OK, "a healthy runner serves this session already")
    assert [line["event"] for line in second.lines] == ["exit"]
    assert operations(emulator, "work.ack", "work.stop") == ["work.ack"]
    emulator.say(session_id, "!echo served")
    await wait_idle(emulator, session_id)
    first.process.terminate()
    await first.exit()


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
async def test_a_newcomer_takes_over_from_a_hung_runner_whose_item_is_queued_again(
    emulator: Emulator, start: Start, pair: Any, tmp_path: Path
) -> None:
    """SIGSTOPped, by its agent say; the newcomer wakes it, it finds its lease lost and ends its shell."""
    session_id, first, _ = pair
    emulator.say(session_id, "![ -e shell ] || { echo $$ > shell; sleep 300; }; echo served")
    shell = int(await wait_file(tmp_path / "workspace" / "shell"))
    await stopped(first.process.pid)
    emulator.advance(400)
    job = await job_values(emulator, emulator.url)
    lock = Lock(tmp_path / "state")
    async with open_api(parse_job(job)) as api:
        assert await take_over(lock, lambda: probe(api, parse_job(job)))
    lock.release()
    assert (await first.exit())[0] == EXIT_LEASE_LOST
    assert not is_alive(shell)
    second = await start(job)
    await wait_idle(emulator, session_id)
    assert texts(emulator, session_id) == [f"Error: {LOST}"]  # and it did not run a second time
    second.process.terminate()
    await second.exit()


async def test_a_runner_killed_outright_leaves_the_lock_to_the_next(
    emulator: Emulator, start: Start, pair: Any
) -> None:
    _, first, job = pair
    first.process.kill()
    await first.exit()
    second = await start(job)
    await second.line("ready")
    assert (await second.exit())[0] == EXIT_LEASE_LOST  # the dead one's lease is alive: no claim, and no stop
    assert operations(emulator, "work.stop") == []
