"""`sandbox_runner.py --check`: what has to be true of a sandbox, tried and not assumed. A build step of our images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import runner_process
from .runner_job import EXIT_CANNOT_RUN, EXIT_OK

BASH = Path("/bin/bash")  # the SDK's bash tool starts exactly this
_SECRET_FILES = ("environ", "mem", "maps", "fd/0")
# Opens each file of another process (opening is what the kernel checks) and prints the names it may open.
_OPEN = """
import os, sys
for name in sys.argv[2:]:
    try:
        os.open(f"/proc/{sys.argv[1]}/{name}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        continue
    print(name)
"""


def check(
    emit: Callable[..., None],
    workdir: Path,
    state_directory: Path,
    *,
    bash: Path = BASH,
    hide: Callable[[], bool] = runner_process.hide,
) -> int:
    """Emits one `check` line each and returns the exit code."""
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("python", _python),
        ("sdk", _sdk),
        ("bash", lambda: "" if os.access(bash, os.X_OK) else f"the SDK's bash tool needs {bash}"),
        ("workdir", lambda: _writable(workdir)),
        ("state", lambda: _writable(state_directory)),
        ("hidden", lambda: _hidden(hide)),
    )
    problems = 0
    for name, attempt in checks:
        problem = attempt()
        emit("check", name=name, ok=not problem, **({"reason": problem} if problem else {}))
        problems += bool(problem)
    return EXIT_CANNOT_RUN if problems else EXIT_OK


def _python() -> str:
    return "" if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed"


def _sdk() -> str:
    try:
        from . import runner_session  # noqa: F401 - loading it is the test
    except ImportError as error:
        return f"the anthropic package cannot be loaded: {error}"
    return ""


def _writable(directory: Path) -> str:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".runner-check-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"{directory} cannot be written: {error.strerror}"
    return ""


def _hidden(hide: Callable[[], bool]) -> str:
    """R11: whether a process of our user, like the agent's shell, can read this one."""
    if os.getuid() == 0:
        return "the runner is root: the agent's shell could read its token; run the sandbox as an ordinary user"
    try:
        if not hide():
            return "this system cannot hide the runner from the agent's shell"
    except OSError as error:
        return f"this system cannot hide the runner from the agent's shell: {error.strerror}"
    reader = [sys.executable, "-I", "-S", "-c", _OPEN, str(os.getpid()), *_SECRET_FILES]
    looked = subprocess.run(reader, capture_output=True, text=True, check=False)
    if looked.returncode != 0:
        return "no other process could be started to look at this one"
    if readable := looked.stdout.split():
        return f"a process of the same user can read /proc/<runner>/{readable[0]}"
    return ""
