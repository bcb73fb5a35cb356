"""The runner as a process, started as hosts start it: its job, its lines, its exit codes, and what it hides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import runner_process
from shared.runner_job import (
    EXIT_BAD_JOB,
    EXIT_CANNOT_RUN,
    EXIT_HANDED_OVER,
    EXIT_LEASE_LOST,
    EXIT_OK,
)
from shared.runner_lock import Lock
from tests.runner.support import (
    PATIENCE_SECONDS,
    RUNNER,
    Start,
    eventually,
    is_alive,
    job_values,
    operations,
    results,
    runners,
    texts,
    unprivileged,
    until,
    wait_file,
    wait_idle,
)
from tools.emulator import Emulator, Switches, call, custom, end, repeat_output

FILES = ("sandbox_runner.py", *sorted(path.name for path in RUNNER.parent.glob("runner_*.py")))
# Processes that leave the shell in every way there is; their pids end up in the file `pids`, then the call hangs.
BREAK_OUT = """!sleep 300 & echo $! >> p
setsid sleep 300 & echo $! >> p
nohup sleep 300 >/dev/null 2>&1 & echo $! >> p
(setsid sh -c 'sleep 300 & echo $! >> p' &)
while [ $(wc -l < p) -lt 4 ]; do sleep 0.05; done
mv p pids
sleep 300"""
SPY = """!for name in environ mem maps auxv fd/0 fd/1; do
  ( : < /proc/$PPID/$name ) 2>/dev/null && echo "opened $name"
done
ls /proc/$PPID/fd /proc/$PPID/cwd/ >/dev/null 2>&1 && echo "listed"
env | grep -c ANTHROPIC
tr '\\0' ' ' < /proc/$PPID/cmdline | grep -c sk-ant
grep -rl -e eyJ -e sk-ant . "$SANDBOX_STATE_DIR" 2>/dev/null | grep -v planted
id -u"""


async def test_an_agent_reads_nothing_of_the_runner_and_plants_nothing_in_it(
    emulator: Emulator, open_directory: Path
) -> None:
    """R11 as an ordinary user; and a copy of the runner's own files is all there is."""
    home, workspace = open_directory / "home", open_directory / "workspace"
    opt = open_directory / "opt" / "runner"
    opt.mkdir(parents=True)
    for name in FILES:
        shutil.copy(RUNNER.parent / name, opt)
    # Where a Python or an SDK that trusts its surroundings would look: cwd, HOME, beside and above the runner.
    planted = f"open({str(workspace / 'planted')!r}, 'a').write(__file__ + '\\n')\nraise SystemExit(99)\n"
    site = home / ".local/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for directory in (workspace, home, site, open_directory / "opt", open_directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("sitecustomize", "usercustomize", "anthropic", "opentelemetry", "httpx2", "runner_job"):
            (directory / f"{name}.py").write_text(planted)
    (home / ".netrc").write_text("machine 127.0.0.1 login planted password planted\n")
    profile = home / ".config" / "anthropic"
    (profile / "configs").mkdir(parents=True)
    (profile / "active_config").write_text("planted")
    (profile / "configs" / "planted.json").write_text('{"base_url": "http://127.0.0.1:9"}')

    session_id = emulator.create_session()
    emulator.say(session_id, f"{SPY}\necho over\nnohup sleep 300 >/dev/null 2>&1 &\necho $! > left")
    environ = {
        "HOME": str(home),
        "SANDBOX_WORKDIR": str(workspace),
        "SANDBOX_STATE_DIR": str(open_directory / "state"),
        **await job_values(emulator, emulator.url),  # the SDK's own contract: the harder case to hide
    }
    async with runners(open_directory) as start:
        runner = await start(
            None,
            runner=opt / "sandbox_runner.py",
            prefix=("env", "-C", str(workspace), *unprivileged()),
            environ=environ,
        )
        assert await runner.exit() == (EXIT_OK, "the session is idle")
    uid = str(os.getuid() or 65534)
    assert texts(emulator, session_id) == [f"0\n0\n{uid}\nover"]
    assert not (workspace / "planted").exists()
    assert {record.credential for record in emulator.requests if record.operation != "work.poll"} == {"sessions_token"}
    assert [line["event"] for line in runner.lines] == ["ready", "claimed", "tool", "exit"]
    assert not is_alive(int((workspace / "left").read_text()))  # what a call left behind ends with the runner


async def test_sigterm_ends_the_whole_tree_and_hands_the_session_over(
    emulator: Emulator, start: Start, tmp_path: Path
) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, BREAK_OUT)
    job = tmp_path / "job"
    job.write_text(json.dumps(await job_values(emulator, emulator.url)))
    runner = await start(None, "--job-file", str(job))
    pids = [int(line) for line in (await wait_file(tmp_path / "workspace" / "pids")).split()]
    assert len(pids) == 4
    assert all(is_alive(pid) for pid in pids)
    assert not job.exists()
    told = time.monotonic()
    runner.process.terminate()
    await eventually(lambda: not any(is_alive(pid) for pid in pids), within=5)
    assert (await runner.exit())[0] == EXIT_HANDED_OVER
    assert time.monotonic() - told < 30
    assert [line["event"] for line in runner.lines] == ["ready", "claimed", "tool", "handover", "exit"]
    assert operations(emulator)[-2:] == ["work.stop", "events.send"]
    assert emulator.work(session_id)["state"] == "queued"


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
@pytest.mark.parametrize("lease_ttl", [8.0])
async def test_a_lost_lease_ends_the_whole_tree(emulator: Emulator, start: Start, tmp_path: Path) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, BREAK_OUT)
    runner = await start(await job_values(emulator, emulator.url))
    pids = [int(line) for line in (await wait_file(tmp_path / "workspace" / "pids")).split()]
    emulator.advance(20)
    assert await runner.exit() == (EXIT_LEASE_LOST, "the lease was lost")
    assert not any(is_alive(pid) for pid in pids)
    assert operations(emulator, "work.stop", "events.send") == []


BLOCKING = '''
import os
import time
from collections.abc import Iterator
from pathlib import Path
from anthropic.lib.tools import beta_tool

def tools(context):
    @beta_tool
    def block() -> str:
        """Blocks its thread for good."""
        has_no_input = os.path.samestat(os.fstat(0), os.stat(os.devnull))
        Path(context.workdir, "begun").write_text(str(has_no_input))
        time.sleep(300)
        return "never"

    return [block]
'''


async def test_a_thread_that_blocks_does_not_keep_the_process(emulator: Emulator, start: Start, tmp_path: Path) -> None:
    """With its output closed, too: the host that read it is gone. And nothing inherits what the job came on."""
    (tmp_path / "mine.py").write_text(BLOCKING)
    session_id = emulator.create_session()
    emulator.set_script(session_id, [custom("block"), repeat_output, end()])
    emulator.say(session_id, "go")
    job = await job_values(emulator, emulator.url, SANDBOX_TOOLS=f"{tmp_path}/mine.py:tools")
    runner = await start(job)
    await runner.line("ready")
    await runner.hang_up()
    assert await wait_file(tmp_path / "workspace" / "begun") == "True"
    runner.process.terminate()
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await runner.process.wait() == EXIT_HANDED_OVER
    assert "may have taken effect" in results(emulator, session_id)[0]


LOADING = """
import time
from collections.abc import Iterator
from pathlib import Path
Path({directory!r}, "loading").write_text("1")
while not Path({directory!r}, "loaded").exists():
    time.sleep(0.01)
def tools(context):
    return []
"""


async def test_sigterm_is_heard_although_the_host_had_blocked_it(
    emulator: Emulator, start: Start, tmp_path: Path
) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!echo 1 > begun; sleep 300")
    values = await job_values(emulator, emulator.url)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        runner = await start(values)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    await wait_file(tmp_path / "workspace" / "begun")
    runner.process.terminate()
    assert (await runner.exit())[0] == EXIT_HANDED_OVER


async def test_sigterm_while_loading_leaves_the_item_to_the_next_runner(
    emulator: Emulator, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(LOADING.format(directory=str(tmp_path)))
    session_id = emulator.create_session()
    runner = await start(await job_values(emulator, emulator.url, SANDBOX_TOOLS=f"{tmp_path}/mine.py:tools"))
    await wait_file(tmp_path / "loading")
    assert runner.lines == []  # ready means loaded
    runner.process.terminate()
    runner.process.terminate()
    (tmp_path / "loaded").touch()
    assert await runner.exit() == (EXIT_HANDED_OVER, "told to leave before the ack")
    assert [line["event"] for line in runner.lines] == ["exit"]
    assert operations(emulator) == []
    assert emulator.work(session_id)["state"] == "queued"


async def test_sigterm_while_waiting_for_the_lock(emulator: Emulator, start: Start, tmp_path: Path) -> None:
    emulator.create_session()
    lock = Lock(tmp_path / "state")
    assert lock.try_take()
    asked = tmp_path / "state" / "runner.lock"
    before = asked.stat().st_atime_ns
    os.utime(asked, ns=(0, before))
    runner = await start(await job_values(emulator, emulator.url))
    await eventually(lambda: asked.stat().st_atime_ns > 0)  # it has read what the holder says
    runner.process.terminate()
    assert await runner.exit() == (EXIT_HANDED_OVER, "told to leave while another runner held the lock")
    assert operations(emulator) == []
    lock.release()


async def test_a_message_reaches_a_runner_whose_host_has_hung_up(
    emulator: Emulator, start: Start, tmp_path: Path
) -> None:
    session_id = emulator.create_session()
    runner = await start(await job_values(emulator, emulator.url, SANDBOX_MAX_IDLE_SECONDS="60"))
    await runner.line("ready")
    await runner.hang_up()
    await until(emulator, lambda: emulator.work(session_id)["state"] == "active")
    emulator.say(session_id, "!echo still here")
    await wait_idle(emulator, session_id)
    assert texts(emulator, session_id) == ["still here"]
    emulator.archive_session(session_id)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await runner.process.wait() == EXIT_OK


def test_a_host_that_does_not_read_holds_nothing_up() -> None:
    code = "from shared.sandbox_runner import emit\nfor _ in range(3000): emit('tool', name='x' * 100)"
    reader, writer = os.pipe()
    try:
        argv = [sys.executable, "-c", code]
        done = subprocess.run(argv, stdout=writer, cwd=RUNNER.parents[1], timeout=PATIENCE_SECONDS, check=False)
    finally:
        os.close(writer)
        first = os.read(reader, 100)
        os.close(reader)
    assert done.returncode == 0
    assert first.startswith(b'{"event": "tool"')


async def _exit(start: Start, job: object, *arguments: str, **environ: str) -> tuple[int, str]:
    runner = await start(job, *arguments, environ=environ)
    code, reason = await runner.exit()
    assert [line["event"] for line in runner.lines] == ["exit"], runner.noise
    assert runner.lines[0]["code"] == code
    return code, reason


async def test_a_bad_job_is_64_and_quotes_nothing(start: Start, tmp_path: Path) -> None:
    secret = "sk-ant-req-sesame"
    assert await _exit(start, b"{" + secret.encode()) == (EXIT_BAD_JOB, "the job is not valid JSON")
    code, reason = await _exit(start, None, ANTHROPIC_WORK_SECRET=secret, ANTHROPIC_WORK_ID="w")
    assert code == EXIT_BAD_JOB
    assert reason.startswith("the job lacks ANTHROPIC_SESSION_ID, ANTHROPIC_ENVIRONMENT_ID:")
    (tmp_path / "link").symlink_to(tmp_path / "job")
    (tmp_path / "job").write_text("{}")
    code, reason = await _exit(start, None, "--job-file", str(tmp_path / "link"))
    assert code == EXIT_BAD_JOB
    assert reason.startswith("the job file cannot be read")


GOOD = {
    "ANTHROPIC_SESSION_ID": "s",
    "ANTHROPIC_WORK_ID": "w",
    "ANTHROPIC_ENVIRONMENT_ID": "e",
    "ANTHROPIC_ENVIRONMENT_KEY": "k",
}


async def test_directories_that_cannot_be_used_are_69_and_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "below")
    assert await _exit(start, GOOD, SANDBOX_WORKDIR=below) == (
        EXIT_CANNOT_RUN,
        "SANDBOX_WORKDIR cannot be used: Not a directory",
    )
    assert await _exit(start, GOOD, SANDBOX_STATE_DIR=below) == (
        EXIT_CANNOT_RUN,
        "SANDBOX_STATE_DIR cannot be used: Not a directory",
    )
    code, reason = await _exit(start, GOOD, SANDBOX_STATE_DIR="/proc")
    assert code == EXIT_CANNOT_RUN
    assert reason.startswith("the lock in SANDBOX_STATE_DIR cannot be used")


async def test_custom_tools_that_cannot_be_loaded_are_69(start: Start, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def tools(:\n")
    code, reason = await _exit(start, {**GOOD, "SANDBOX_TOOLS": f"{tmp_path}/mine.py:tools"})
    assert code == EXIT_CANNOT_RUN
    assert reason.startswith("SyntaxError")


def test_help_says_what_there_is() -> None:
    done = subprocess.run([sys.executable, "-I", str(RUNNER), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--check" in done.stdout
    assert "--job-file" in done.stdout


async def test_a_command_that_took_too_long_leaves_nothing_behind_and_earlier_servers_alone(
    emulator: Emulator, start: Start, tmp_path: Path
) -> None:
    """The SDK kills the shell, and only the shell."""
    serve = "(while true; do sleep 300 & echo $! >> workers; wait; done) & echo $! > server"
    serve += "; until [ -s workers ]; do sleep 0.01; done"
    slow = "sleep 300 & echo $! > left; setsid sh -c 'sleep 300 & wait' & kill -9 $(head -n 1 workers); sleep 300"
    session_id = emulator.create_session()
    emulator.set_script(
        session_id, [call("bash", command=serve), call("bash", command=slow, timeout_ms=3000), repeat_output, end()]
    )
    emulator.say(session_id, "go")
    runner = await start(await job_values(emulator, emulator.url, SANDBOX_MAX_IDLE_SECONDS="60"))
    await until(emulator, lambda: texts(emulator, session_id))
    assert "timed out" in texts(emulator, session_id)[0]
    server, left = (int((tmp_path / "workspace" / name).read_text()) for name in ("server", "left"))
    workers = tmp_path / "workspace" / "workers"
    worker = int((await eventually(lambda: workers.read_text().split()[1:]))[0])
    assert not is_alive(left)
    below = set(runner_process.descendants(runner.process.pid))
    assert below == {server, worker}  # the server of the first call, and the worker that it began during the second


def score(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_commands_die_of_memory_before_the_runner(emulator: Emulator, open_directory: Path) -> None:
    """As an ordinary user, for whom hiding closes the file of his own score."""
    session_id = emulator.create_session()
    ask = "echo $PPID > ../home/runner; cat /proc/self/oom_score_adj; sh -c 'cat /proc/self/oom_score_adj'"
    emulator.set_script(session_id, [call("bash", command=ask), repeat_output, end()])
    emulator.say(session_id, "go")
    async with runners(open_directory) as start:
        runner = await start(
            await job_values(emulator, emulator.url, SANDBOX_MAX_IDLE_SECONDS="60"), prefix=unprivileged()
        )
        await until(emulator, lambda: texts(emulator, session_id))
        own = score(runner.process.pid)
        assert texts(emulator, session_id) == [f"{own + 500}\n{own + 500}"]
        (shell,) = (pid for pid in runner_process.descendants(runner.process.pid) if score(pid) == own + 500)
        assert score(int((open_directory / "home" / "runner").read_text())) == own
        assert is_alive(shell)


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group with 300 MB of memory, where the machine lets us make one: version 1, or 2."""
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(parent, f"runner-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            break
        group.rmdir()
    else:
        pytest.xfail("no memory control group can be made here")
    (group / limit).write_text(str(300 * 1024 * 1024))
    yield group
    deadline = time.monotonic() + 20
    while (left := (group / "cgroup.procs").read_text().split()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    group.rmdir()


async def test_many_small_hogs_are_killed_and_the_runner_goes_on(
    emulator: Emulator, start: Start, tmp_path: Path, small_memory: Path
) -> None:
    """Each is smaller than the runner, which the kernel would take first by size alone."""
    hog = "python3 -c 'x = bytearray(30_000_000); import time; time.sleep(3)' &"
    session_id = emulator.create_session()
    emulator.set_script(session_id, [call("bash", command=f"{hog * 14} wait; echo over"), repeat_output, end()])
    emulator.say(session_id, "go")
    in_group = ("sh", "-c", f'echo $$ > {small_memory}/cgroup.procs && exec "$@"', "sh")
    runner = await start(await job_values(emulator, emulator.url), prefix=in_group)
    assert (await runner.exit())[0] == EXIT_OK
    assert len(texts(emulator, session_id)) == 1
