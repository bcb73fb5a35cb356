"""What a sandbox needs before a runner starts in it: a user for the agent, directories, the SDK, the runner's files.

`bake.py` does this once for a snapshot; without one, the first launch of each sandbox does. Everything is root's below
/opt/sandboxes, under names made of what is in it, so a newer deployment finds its own things beside the older ones, and
the agent, who is a user without sudo, cannot change what the next runner is. The SDK comes from this folder's lock, by
hash.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = "/opt/sandboxes"
AGENT = "agent"
HOME = f"/home/{AGENT}"
WORKSPACE = "/workspace"
STATE = "/var/lib/sandbox-runner"
MEMORY = "/mnt/memory"  # where the SDK puts memory stores
VARIABLES = {"LANG": "C.UTF-8", "SANDBOX_STATE_DIR": STATE, "SANDBOX_WORKDIR": WORKSPACE}
_DISTRIBUTION = "anthropic"
_ELSEWHERE = re.compile(r"== '(win32|emscripten|darwin)'")  # in the marker of what Linux does not need

# $0 the name of the SDK's environment, $1 the name of the runner's directory, stdin both as a tar. Run by root, again
# and again, by several at once.
SCRIPT = f"""
set -eu
umask 022
mkdir -p {ROOT}
exec 9>{ROOT}/lock
flock 9
if [ -e {ROOT}/$0/ready ] && [ -e {ROOT}/$1 ]; then exit 0; fi
incoming=$(mktemp -d {ROOT}/incoming.XXXXXX)
trap 'rm -rf "$incoming"' EXIT
tar -xf - -C "$incoming"
if id {AGENT} >/dev/null 2>&1; then
    pkill -KILL -u {AGENT} || true
else
    useradd --create-home --home-dir {HOME} --user-group --shell /bin/bash {AGENT}
fi
install -d -o {AGENT} -g {AGENT} {WORKSPACE} {MEMORY}
install -d -m 700 -o {AGENT} -g {AGENT} {STATE}
if [ ! -e {ROOT}/$0/ready ]; then
    for python in /vercel/runtimes/python/bin/python3 python3.14 python3.13 python3.12 python3.11 python3 install; do
        if [ $python = install ]; then
            if command -v dnf >/dev/null; then dnf install -y -q python3.12 python3.12-pip >&2; python=python3.12
            else apt-get update -qq >&2; apt-get install -y -qq python3 python3-venv >&2; python=python3; fi
        fi
        $python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    rm -rf {ROOT}/$0
    $python -m venv {ROOT}/$0
    {ROOT}/$0/bin/python -m pip install -q --no-input --disable-pip-version-check --require-hashes \\
        -r "$incoming/requirements.txt" >&2
    touch {ROOT}/$0/ready
fi
if [ ! -e {ROOT}/$1 ]; then
    {ROOT}/$0/bin/python -m compileall -q "$incoming/runner"
    mv "$incoming/runner" {ROOT}/$1
fi
"""


@dataclass(frozen=True)
class Image:
    """One version of it."""

    sdk: str
    """The directory of the SDK's environment below ROOT."""
    runner: str
    """The directory of the runner's files below ROOT."""
    archive: bytes
    """Both, as `SCRIPT` reads them."""

    @property
    def python(self) -> str:
        return f"{ROOT}/{self.sdk}/bin/python"

    @property
    def program(self) -> str:
        return f"{ROOT}/{self.runner}/sandbox_runner.py"

    @property
    def marks(self) -> tuple[str, str]:
        """The files that exist when all is done."""
        return f"{ROOT}/{self.sdk}/ready", self.program

    @property
    def start(self) -> str:
        return f"{ROOT}/{self.runner}/start.py"

    def arguments(self, *more: str, program: str | None = None) -> list[str]:
        """Those of `python`, run by root, that start the runner (or `program`) as the agent's user."""
        return ["-I", self.start, AGENT, program or self.program, *more]


def load(folder: Path) -> Image:
    """The image of the deployment in `folder`."""
    needed = requirements((folder / "uv.lock").read_text(encoding="utf-8")).encode()
    modules = [folder / "start.py", folder / "_shared/sandbox_runner.py", *(folder / "_shared").glob("runner_*.py")]
    files = {f"runner/{path.name}": path.read_bytes() for path in sorted(modules)}
    runner = hashlib.sha256(b"".join(name.encode() + b"\0" + files[name] for name in files)).hexdigest()
    sdk = hashlib.sha256(needed).hexdigest()
    return Image(f"sdk-{sdk[:16]}", f"runner-{runner[:16]}", tar(files | {"requirements.txt": needed}))


def requirements(lock: str) -> str:
    """What the runner imports, with all it needs, as pip reads it: exact versions and their hashes, from a uv.lock."""
    packages = {package["name"]: package for package in tomllib.loads(lock)["package"]}
    needed: dict[str, str] = {}
    todo = [_DISTRIBUTION]
    while todo:
        package = packages[todo.pop()]
        if package["name"] in needed:
            continue
        artifacts = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
        hashes = " ".join(f"--hash={artifact['hash']}" for artifact in artifacts)
        needed[package["name"]] = f"{package['name']}=={package['version']} {hashes}\n"
        todo += [
            dependency["name"]
            for dependency in package.get("dependencies", ())
            if not _ELSEWHERE.search(dependency.get("marker", ""))
        ]
    return "".join(needed[name] for name in sorted(needed))


def tar(files: Mapping[str, bytes]) -> bytes:
    """An archive of files: path -> content."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            out.addfile(info, io.BytesIO(content))
    return archive.getvalue()
