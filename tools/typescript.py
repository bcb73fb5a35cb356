"""TypeScript folders on this machine: their Node, their npm packages, and their steps of `make check`.

    python -m tools.typescript check providers/cloudflare-worker
    python -m tools.typescript format providers/cloudflare-worker

Everything happens in a copy of the folder in .tools/, made from the folder's own lock: nothing that is not the folder's
can be found there, and the tree stays clean. Node is this machine's own when it is new enough, else the one that
tools/node/package-lock.json names. Exit codes: 0 done, 1 failed, 77 this machine has no npm (on CI: 1).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.check import EXIT_SKIPPED
from tools.sync_shared import ROOT, shared_sources

OLDEST_NODE = (22, 12)  # wrangler's own minimum
NOT_COPIED = ("node_modules", ".wrangler", ".env", ".dev.vars", "dist")
_INSTALL = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
_ERROR_LINES = 25
_CHECKS = (
    ["wrangler", "types", "--include-runtime=false", "--check"],
    ["tsc"],
    ["biome", "check", "--error-on-warnings"],
)


class ToolchainMissing(Exception):
    """This machine cannot run a TypeScript folder. The message says what to install."""


class InstallFailed(Exception):
    """npm could not install what a lock names. The message has what npm said."""


def node(root: Path = ROOT) -> Path:
    """A Node that is new enough. Raises `ToolchainMissing`."""
    if (own := shutil.which("node")) and _version(own) >= OLDEST_NODE:
        return Path(own)
    fetched = _installed(root / "tools/node", root / ".tools/node", os.environ.get("PATH", ""))
    for program in sorted(fetched.glob("node_modules/*/bin/node")):
        return program
    wanted = ".".join(map(str, OLDEST_NODE))
    raise ToolchainMissing(f"there is no Node for this platform in tools/node: install Node {wanted} or newer")


def workspace(folder: Path, root: Path = ROOT) -> Path:
    """A copy of the folder with its npm packages, up to date. Raises `ToolchainMissing`."""
    path = f"{node(root).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    copy = _installed(folder, root / ".tools/typescript" / folder.name, path)
    with _locked(copy.with_suffix(".lock")):
        _mirror(folder, copy)
    return copy


def environment(root: Path = ROOT) -> dict[str, str]:
    """For npm's programs: our Node first, no questions, no news sent home."""
    path = f"{node(root).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    theirs = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return theirs | {"PATH": path, "CI": "1", "WRANGLER_SEND_METRICS": "false", "NO_COLOR": "1"}


def program(copy: Path, name: str) -> str:
    """A program of the folder's npm packages."""
    return str(copy / "node_modules/.bin" / name)


def _version(program: str) -> tuple[int, ...]:
    printed = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return tuple(int(part) for part in re.findall(r"\d+", printed)[:2])


def _installed(folder: Path, base: Path, path: str) -> Path:
    """A directory with the folder's locked npm packages. Several processes may ask at once: one makes it."""
    if shutil.which("npm", path=path) is None:
        raise ToolchainMissing("npm is not installed, and TypeScript folders need it")
    digest = hashlib.sha256()
    for name in ("package.json", "package-lock.json"):
        digest.update((folder / name).read_bytes())
    finished = base.with_name(f"{base.name}-{digest.hexdigest()[:16]}")
    base.parent.mkdir(parents=True, exist_ok=True)
    with _locked(base.with_suffix(".lock")):
        if not finished.is_dir():
            unfinished = base.with_name(f"{base.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copyfile(folder / name, unfinished / name)
            environ = os.environ | {"PATH": path}
            done = subprocess.run(_INSTALL, cwd=unfinished, env=environ, capture_output=True, text=True, check=False)
            if done.returncode:
                told = "\n".join(done.stderr.splitlines()[:_ERROR_LINES])  # then comes npm's manual
                raise InstallFailed(f"npm ci failed for {folder}:\n{told}")
            unfinished.rename(finished)
    return finished


def _mirror(folder: Path, copy: Path) -> None:
    """Makes `copy` hold the folder's files and no others, but for what npm and wrangler put there."""
    wanted = {path for path in _files(folder) if path.parts[0] not in NOT_COPIED}
    for path in _files(copy):
        if path not in wanted and path.parts[0] not in NOT_COPIED:
            (copy / path).unlink()
    for path in wanted:
        source, target = folder / path, copy / path
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _files(directory: Path) -> set[Path]:
    found: set[Path] = set()
    for entry in directory.iterdir():
        if entry.name in NOT_COPIED:
            continue
        paths = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
        found |= {path.relative_to(directory) for path in paths}
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check(folder: Path) -> int:
    """Types of the configuration, types, lint and format: every step runs."""
    copy, failed = workspace(folder), False
    for name, *arguments in _CHECKS:
        done = subprocess.run(
            [program(copy, name), *arguments], cwd=copy, env=environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed = True
            sys.stdout.write(f"{name} {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return 1 if failed else 0


def format_sources(folder: Path) -> int:
    """Formats the folder's files, and shared/typescript, from where it has copies."""
    copy = workspace(folder)
    subprocess.run([program(copy, "biome"), "check", "--write"], cwd=copy, env=environment(), check=False)
    types = [program(copy, "wrangler"), "types", "--include-runtime=false"]
    subprocess.run(types, cwd=copy, env=environment(), check=True, stdout=subprocess.DEVNULL)
    for path in sorted(_files(copy)):
        source = shared_sources(ROOT, folder) / path.name if path.parts[0] == "_shared" else folder / path
        if path.name != "VERSION" and (not source.is_file() or source.read_bytes() != (copy / path).read_bytes()):
            shutil.copyfile(copy / path, source)
            print(f"wrote {source.relative_to(ROOT)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.typescript", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["check", "format"])
    parser.add_argument("folder", type=Path, help="a TypeScript folder of providers/")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    try:
        return check(folder) if options.command == "check" else format_sources(folder)
    except InstallFailed as error:
        print(error)
        return 1
    except ToolchainMissing as error:
        print(error)
        return 1 if os.environ.get("CI") else EXIT_SKIPPED


if __name__ == "__main__":
    sys.exit(main())
