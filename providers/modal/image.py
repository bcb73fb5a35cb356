"""The image of every sandbox, and of the host's functions: built once, when the app is deployed."""

from __future__ import annotations

from pathlib import Path

import modal

HERE = Path(__file__).resolve().parent
INSIDE = "/opt/sandbox"  # root's: the agent can read the runner, and not change it
TOOLS = "/opt/tools"  # custom tools, from the folder `tools` beside this file
PYTHON = "3.12"
PACKAGES = ("anthropic[webhooks]==2.12.0", "fastapi==0.165.0")  # as in pyproject.toml
AGENT = "useradd --create-home --uid 10001 --user-group --shell /bin/bash agent"
COMPILE = f"python -m compileall -q {INSIDE} {TOOLS} $(python -c 'import anthropic; print(*anthropic.__path__)')"
CHECK = f"setpriv --reuid 10001 --regid 10001 --clear-groups python -I {INSIDE}/_shared/sandbox_runner.py --check"


def sandbox_image() -> modal.Image:
    """The runner, the pinned SDK compiled to bytecode, and a user for the agent. The build fails where the runner could
    not run, or could not hide from the agent's shell."""
    return (
        modal.Image.debian_slim(python_version=PYTHON)
        .apt_install("curl", "git", "procps")
        .pip_install(*PACKAGES)
        .pip_install_from_requirements(str(HERE / "tools" / "requirements.txt"))
        .run_commands(AGENT, "install -d -o agent -g agent /workspace")
        .add_local_dir(HERE / "_shared", f"{INSIDE}/_shared", copy=True, ignore=["**/__pycache__"])
        .add_local_file(HERE / "sandbox_init.py", f"{INSIDE}/sandbox_init.py", copy=True)
        .add_local_dir(HERE / "tools", TOOLS, copy=True, ignore=["**/__pycache__"])
        .run_commands(COMPILE, CHECK)
    )
