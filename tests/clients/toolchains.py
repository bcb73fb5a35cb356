"""Foreign clients, installed or built once into the git-ignored .tools/ and used again while their source stays."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".tools" / "clients"
INSTALL_SECONDS = 600


def typescript() -> list[str]:
    """The command of the TypeScript client."""
    node, npm = needed("node"), needed("npm")

    def install(into: Path) -> None:
        run([npm, "ci", "--no-audit", "--no-fund", "--prefer-offline"], into)

    return [node, str(made("typescript", install, run([node, "--version"], HERE)) / "client.mjs")]


def golang() -> list[str]:
    """The command of the Go client."""
    go = needed("go")

    def build(into: Path) -> None:
        # Static: it runs in containers, too. Unoptimised: it is built more often than it is run for long.
        run(["env", "CGO_ENABLED=0", go, "build", "-gcflags=all=-N -l", "-o", "client", "."], into)

    return [str(made("go", build, run([go, "version"], HERE)) / "client")]


def needed(name: str) -> str:
    """The program; without it the test fails on CI and skips elsewhere."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/go/bin")  # where Go's installer puts itself
    if found is None:
        reason = f"{name} is not installed, and this client needs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def made(name: str, make: Callable[[Path], None], toolchain: str) -> Path:
    """A copy of the client's folder with `make` done to it. Several test processes may ask at once: one makes it."""
    source = HERE / name
    digest = hashlib.sha256(toolchain.encode())
    for file in sorted(source.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    finished = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / f"{name}.lock"):
        if not finished.exists():
            unfinished = CACHE / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(source, unfinished)
            make(unfinished)
            unfinished.rename(finished)
    return finished


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout
