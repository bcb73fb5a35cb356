"""`sandbox_runner.py --check`: what has to be true of a sandbox, tried and not assumed. A build step of our images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import runner_process
from .runner_job import EXIT_CANNOT_RUN, EXIT_OK

_SECRET_FILES = ("environ", "mem", "maps", "fd/0")


def check(emit: Callable[..., None], workdir: Path, state_directory: Path) -> int:
    """Emits one `check` line each and returns the exit code."""
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("python", _python),
        ("sdk", _sdk),
        ("bash", _bash),
        ("workdir", lambda: _writable(workdir)),
        ("state", lambda: _writable(state_directory)),
        ("hidden", _hidden),
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


def _bash() -> str:
    return "" if os.access("/bin/bash", os.X_OK) else "the SDK's bash tool needs /bin/bash"


def _writable(directory: Path) -> str:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".runner-check-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"{directory} cannot be written: {error.strerror}"
    return ""


def _hidden() -> str:
    """Whether a process of our user, like the agent's shell, can read this one."""
    if os.getuid() == 0:
        return "the runner is root: the agent's shell could read its token; run the sandbox as an ordinary user"
    if not runner_process.hide():
        return "this system cannot hide the runner from the agent's shell"
    me = os.getpid()
    for name in _SECRET_FILES:
        if subprocess.run(["/bin/cat", f"/proc/{me}/{name}"], capture_output=True, check=False).returncode == 0:
            return f"a process of the same user can read /proc/<runner>/{name}"
    return ""
