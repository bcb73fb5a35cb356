"""R5's kill and R11's hiding, on real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared import runner_process
from shared.runner_check import check
from shared.runner_job import EXIT_CANNOT_RUN
from tests.runner.support import PATIENCE_SECONDS, RUNNER, is_alive, unprivileged

ROOT = Path(__file__).resolve().parents[2]
# A subreaper that starts a shell, whose processes leave it in every way there is; prints their pids, then sleeps.
TREE = f"""
import subprocess, sys, time
sys.path.append({str(ROOT)!r})
from shared import runner_process
runner_process.adopt_orphans()
shell = '''
sleep 300 & echo $!
setsid sleep 300 & echo $!
nohup sleep 300 >/dev/null 2>&1 & echo $!
(setsid sh -c "sleep 300 >/dev/null & echo \\\\$!" &)
'''
subprocess.Popen(["/bin/bash", "-c", shell])
time.sleep(300)
"""

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    with contextlib.ExitStack() as stack:

        def start(*argv: str) -> subprocess.Popen[str]:
            child = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
            stack.callback(child.kill)
            return child

        yield start


def test_the_whole_tree_is_killed_however_it_left_its_group(spawn: Spawn) -> None:
    top = spawn(sys.executable, "-I", "-c", TREE)
    assert top.stdout is not None
    pids = [int(top.stdout.readline()) for _ in range(4)]
    assert set(pids) <= set(runner_process.descendants(top.pid))
    assert runner_process.kill_descendants(top.pid) >= 4
    assert not any(is_alive(pid) for pid in pids)
    assert top.poll() is None
    runner_process.kill_tree(top.pid)
    assert top.wait() == -signal.SIGKILL


def test_a_name_with_brackets_and_spaces_is_no_obstacle(spawn: Spawn, tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 ("
    odd.symlink_to("/bin/sleep")
    child = spawn(str(odd), "300")
    assert child.pid in runner_process.descendants(os.getpid())


def test_signals_to_who_is_gone_are_no_error(spawn: Spawn) -> None:
    child = spawn("true")
    child.wait()
    runner_process.terminate(child.pid)
    runner_process.kill_tree(child.pid)
    assert runner_process.kill_descendants(child.pid) == 0


def test_an_adopted_zombie_is_collected_at_the_second_look(spawn: Spawn) -> None:
    child = spawn("true")
    reaper = runner_process.OrphanReaper()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while is_alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    reaper.reap()
    assert Path(f"/proc/{child.pid}").exists()  # whoever started it may still ask for its exit code
    reaper.reap()
    assert not Path(f"/proc/{child.pid}").exists()


# What a check sees, run as an ordinary user: {named case: keyword arguments of `check`}.
CHECKS = f"""
import json, sys
sys.path.append({str(ROOT)!r})
from pathlib import Path
from shared import runner_process
from shared.runner_check import check
directory = Path(sys.argv[1])
cases = {{
    "pretended": dict(hide=lambda: True),
    "impossible": dict(hide=lambda: False),
    "refused": dict(hide=lambda: (_ for _ in ()).throw(OSError(1, "Operation not permitted"))),
    "no bash": dict(bash=Path("/no/bash")),
    "good": dict(),
}}
for name, options in cases.items():
    lines = []
    emit = lambda event, **values: lines.append(values)
    code = check(emit, directory / "workspace", directory / "state", **options)
    print(json.dumps([name, code, {{line["name"]: line.get("reason", "") for line in lines}}]))
"""


def test_the_check_tries_what_it_promises(open_directory: Path) -> None:
    """One process for all cases: hiding lasts, so the case that is really hidden comes last."""
    argv = [*unprivileged(), sys.executable, "-I", "-c", CHECKS, str(open_directory)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = {name: (code, reasons) for name, code, reasons in map(json.loads, done.stdout.splitlines())}
    assert seen["good"] == (0, dict.fromkeys(("python", "sdk", "bash", "workdir", "state", "hidden"), ""))
    for case, name, reason in (
        ("pretended", "hidden", "a process of the same user can read /proc/<runner>/environ"),
        ("impossible", "hidden", "this system cannot hide the runner from the agent's shell"),
        ("refused", "hidden", "this system cannot hide the runner from the agent's shell: Operation not permitted"),
        ("no bash", "bash", "the SDK's bash tool needs /no/bash"),
    ):
        code, reasons = seen[case]
        assert code == EXIT_CANNOT_RUN
        assert reasons[name] == reason
        assert not any(other for key, other in reasons.items() if key != name)


def _check(*prefix: str, python: tuple[str, ...] = ("-I",), **environ: str) -> tuple[int, dict[str, str]]:
    argv = [*prefix, sys.executable, *python, str(RUNNER), "--check"]
    environ = {"PATH": os.environ["PATH"], **environ}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environ)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["event"] for line in lines} == {"check"}, done.stderr
    assert all(line["ok"] == ("reason" not in line) for line in lines)
    return done.returncode, {line["name"]: line.get("reason", "") for line in lines}


def test_the_check_fails_for_directories_that_cannot_be_written(open_directory: Path) -> None:
    closed = open_directory / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    code, reasons = _check(
        *unprivileged(), SANDBOX_WORKDIR=str(closed / "workspace"), SANDBOX_STATE_DIR=str(closed / "state")
    )
    assert code == EXIT_CANNOT_RUN
    assert reasons["workdir"] == f"{closed}/workspace cannot be written: Permission denied"
    assert reasons["state"] == f"{closed}/state cannot be written: Permission denied"
    assert not reasons["hidden"]


def test_the_check_fails_without_the_sdk(tmp_path: Path) -> None:
    code, reasons = _check(
        python=("-I", "-S"), SANDBOX_WORKDIR=str(tmp_path / "w"), SANDBOX_STATE_DIR=str(tmp_path / "s")
    )
    assert code == EXIT_CANNOT_RUN
    assert reasons["sdk"].startswith("the anthropic package cannot be loaded: No module named")


def test_the_check_fails_for_root(tmp_path: Path) -> None:
    """Root reads everything; there is nothing to try. Ran by an ordinary user, this says what it must say of him."""
    lines: list[dict[str, object]] = []
    check(lambda event, **values: lines.append(values), tmp_path, tmp_path, hide=lambda: False)
    reason = next(str(line["reason"]) for line in lines if line["name"] == "hidden")
    assert ("the runner is root" in reason) == (os.getuid() == 0)
