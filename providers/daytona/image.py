"""The image of the sandboxes: `sandbox.Dockerfile`, the runner, and the files of `sandbox_files/` if there are any.

It is one text, because the files are in it, packed. So nothing has to be uploaded, and a hash of what is in it names
the snapshot: a host knows which one belongs to it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import tarfile
from pathlib import Path

RUNNER = "/opt/runner/sandbox_runner.py"
FILES = "/opt/sandbox_files"
WORKSPACE = "/workspace"
_HERE = Path(__file__).resolve().parent
NAME = re.compile(r"sandboxes-[0-9a-f]{16}")
_LINE = 1000  # characters; a line of a Dockerfile has a limit
_MOST = 100_000  # characters packed; a command has a limit too


def dockerfile(folder: Path = _HERE) -> str:
    """The whole text. Raises `ValueError` for what it cannot hold."""
    text = (folder / "sandbox.Dockerfile").read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        if line.upper().split()[:1] in (["COPY"], ["ADD"]):
            raise ValueError(f"sandbox.Dockerfile:{number}: no COPY or ADD: put the files into sandbox_files/")
    parts = [text.rstrip("\n"), "USER root"]
    parts += [_unpack(files, target) for target, files in _packed(folder).items() if files]
    return "\n".join([*parts, "USER sandbox", f"RUN python3 -I {RUNNER} --check"]) + "\n"


def name(cpu: int | None = None, memory_gib: int | None = None, disk_gib: int | None = None) -> str:
    """The snapshot's name: a hash of what is in it and of the size of the machine."""
    digest = hashlib.sha256(f"{cpu} {memory_gib} {disk_gib}".encode())
    digest.update((_HERE / "sandbox.Dockerfile").read_bytes())
    for target, files in _packed(_HERE).items():
        for inside, path in files.items():
            content = path.read_bytes()
            digest.update(f"\n{target}/{inside} {len(content)}\n".encode() + content)
    return f"sandboxes-{digest.hexdigest()[:16]}"


def _packed(folder: Path) -> dict[str, dict[str, Path]]:
    """What is added to the Dockerfile's own: directory in the image -> name in it -> file."""
    shared, own = folder / "_shared", folder / "sandbox_files"
    runner = {path.name: path for path in sorted([shared / "sandbox_runner.py", *shared.glob("runner_*.py")])}
    files = {path.relative_to(own).as_posix(): path for path in sorted(own.rglob("*")) if path.is_file()}
    return {str(Path(RUNNER).parent): runner, FILES: files}


def _unpack(files: dict[str, Path], target: str) -> str:
    """A line of a Dockerfile that writes `files` below `target`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for inside, path in files.items():
            entry = tarfile.TarInfo(inside)
            entry.size, entry.mode = path.stat().st_size, 0o644
            archive.addfile(entry, io.BytesIO(path.read_bytes()))
    text = base64.b64encode(gzip.compress(packed.getvalue(), mtime=0)).decode()
    if len(text) > _MOST:
        raise ValueError(f"what goes to {target} is too large: build an image of your own and put it behind FROM")
    lines = " \\\n".join(text[start : start + _LINE] for start in range(0, len(text), _LINE))
    return f"RUN mkdir -p {target} && echo \\\n{lines} \\\n| tr -d ' ' | base64 -d | tar -xzf - -C {target}"
