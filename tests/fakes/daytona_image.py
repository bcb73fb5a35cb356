"""How the Daytona double builds an image: it carries out what a Dockerfile unpacks and checks, for real, and takes the
rest of what it knows (packages, users) as done, since it has this machine's. What it does not know, it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.folders import load_folder

_BUBBLEWRAP = load_folder("local").module("bubblewrap")
_TAKEN_AS_DONE = re.compile(r"RUN (apt-get update|pip install|useradd) ")
_NO_EFFECT = re.compile(r"(FROM|WORKDIR|USER|ENV) \S+")
_PATIENCE_SECONDS = 60.0
_MEMORY_BYTES = 256 << 20


def build(dockerfile: str, image: Path) -> str:
    """Fills `image`, which stands for the image's /opt, and returns the log. Raises `ValueError` when a step fails."""
    log = []
    user = "root"
    for number, line in enumerate(_instructions(dockerfile), 1):
        log.append(f"step {number}: {line[:80]}")
        if line.startswith("USER "):
            user = line.split()[1]
        if _TAKEN_AS_DONE.match(line) or _NO_EFFECT.fullmatch(line):
            continue
        if not line.startswith(("RUN mkdir -p /opt/", "RUN python3 -I /opt/")):
            raise ValueError(f"step {number} is not known here: {line[:80]}")
        command = line.removeprefix("RUN ")
        done = _run_as_root(command, image) if user == "root" else _run_in_a_sandbox(command, image)
        if done.returncode != 0:
            raise ValueError(f"step {number} failed: {done.stdout}{done.stderr}")
        log.append(done.stdout)
    return "\n".join(log)


def _run_as_root(command: str, image: Path) -> subprocess.CompletedProcess[str]:
    return _run(["/bin/sh", "-c", command.replace("/opt/", f"{shlex.quote(str(image))}/")])


def _run_in_a_sandbox(command: str, image: Path) -> subprocess.CompletedProcess[str]:
    """As the image's user, with what the image holds so far."""
    with tempfile.TemporaryDirectory(dir=image.parent) as directory:
        uid = _BUBBLEWRAP.uid_for(image.name)
        for part in ("workspace", "home"):
            Path(directory, part).mkdir()
            if uid:
                os.chown(Path(directory, part), uid, uid)
        shown = {path: Path("/opt", path.name) for path in sorted(image.iterdir())}
        wall = _BUBBLEWRAP.arguments(
            Path(directory), uid=uid, shown=shown, python=sys.executable, memory_bytes=_MEMORY_BYTES
        )
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        return _run([*wall, *drop, "/bin/sh", "-c", command])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(
        command, env={"PATH": path}, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS
    )


def _instructions(dockerfile: str) -> list[str]:
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n", "", "\n".join(lines))
    return [line for line in whole.splitlines() if line.strip()]
