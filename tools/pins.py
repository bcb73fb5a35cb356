"""Direct dependencies are pinned exactly, and equally everywhere: the tests run on the root's environment, so a folder
with another pin would ship untested."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NPM_PIN = re.compile(r"\d+\.\d+\.\d+([-+][0-9A-Za-z.-]+)?")
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?==(?P<version>[^;,\s*]+)\s*(;.*)?")


def problems(root: Path) -> Iterator[str]:
    """Loose pins, pins that differ between two pyproject.toml, and locks that resolve something else."""
    first: dict[str, tuple[str, str]] = {}
    inside = [*root.glob("providers/*/pyproject.toml"), *root.glob("providers/*/container/pyproject.toml")]
    for path in [root / "pyproject.toml", *sorted(inside)]:
        where, locked = str(path.relative_to(root)), _locked(path.with_name("uv.lock"))
        for requirement in _requirements(_parsed(path)):
            if not (pin := _PIN.fullmatch(requirement)):
                yield f"{where}: {requirement} is not pinned exactly (==)"
                continue
            name, version = _normal(pin["name"]), pin["version"]
            if first.setdefault(name, (version, where))[0] != version:
                yield f"{where} pins {name}=={version}, {first[name][1]} pins {first[name][0]}"
            if locked.get(name) != version:
                yield f"{where} pins {name}=={version}, its uv.lock has {locked.get(name)}: run uv lock there"


def npm_problems(root: Path) -> Iterator[str]:
    """The same of every package.json with a lock beside it."""
    first: dict[str, tuple[str, str]] = {}
    for lock in sorted([*root.glob("providers/*/package-lock.json"), *root.glob("t*/**/package-lock.json")]):
        path = lock.with_name("package.json")
        where, project = str(path.relative_to(root)), json.loads(path.read_text(encoding="utf-8"))
        locked = json.loads(lock.read_text(encoding="utf-8"))["packages"]
        kinds = ("dependencies", "devDependencies", "optionalDependencies")
        for name, version in ((name, version) for kind in kinds for name, version in project.get(kind, {}).items()):
            if not _NPM_PIN.fullmatch(version):
                yield f"{where}: {name} {version} is not pinned exactly"
                continue
            if first.setdefault(name, (version, where))[0] != version:
                yield f"{where} pins {name} {version}, {first[name][1]} pins {first[name][0]}"
            if (found := locked.get(f"node_modules/{name}", {}).get("version")) != version:
                yield f"{where} pins {name} {version}, its package-lock.json has {found}: run npm install there"


def _requirements(project: dict[str, Any]) -> list[str]:
    groups = project.get("dependency-groups", {}).values()
    return [*project["project"].get("dependencies", []), *(requirement for group in groups for requirement in group)]


def _locked(lock: Path) -> dict[str, str]:
    packages = _parsed(lock)["package"] if lock.is_file() else []
    return {_normal(package["name"]): package["version"] for package in packages if "version" in package}


def _parsed(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
