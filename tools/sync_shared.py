"""Vendoring: copies shared/ into the provider folders (`make sync`), and proves that nobody edited the copies
(`make check`).

A folder's pyproject.toml says what it takes: `[tool.sandboxes] shared = ["errors.py", ...]`. A TypeScript folder's
package.json says it, `"sandboxes": {"shared": ["errors.ts", ...]}`, of shared/typescript; what it puts into an image
is a Python project below it, with a pyproject.toml and copies of its own. The check looks at the whole tree (content,
length, mode, missing and added files, directories, links), because a checker that only compares what it expects to find
passes a truncated or an extended copy.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import stat
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools import pins, settings_tables

ROOT = Path(__file__).resolve().parent.parent
VENDORED = "_shared"
FIX = "Fix: make sync"


class ManifestError(Exception):
    """A folder's manifest asks for something that cannot be vendored."""


def folders(root: Path) -> list[Path]:
    """The provider folders in Python, by name."""
    return sorted(path.parent for path in root.glob("providers/*/pyproject.toml"))


def typescript_folders(root: Path) -> list[Path]:
    """The provider folders in TypeScript, by name."""
    return sorted(path.parent for path in root.glob("providers/*/package.json") if not is_python(path.parent))


def image_folders(root: Path) -> list[Path]:
    """What a TypeScript folder puts into its image: a Python project of its own, with the runner."""
    return sorted(path.parent for path in root.glob("providers/*/container/pyproject.toml"))


def vendoring(root: Path) -> list[Path]:
    """Everything that has copies of shared/."""
    return [*folders(root), *image_folders(root), *typescript_folders(root)]


def is_python(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file()


def shared_sources(root: Path, folder: Path) -> Path:
    """The directory whose files `folder` vendors."""
    return root / "shared" if is_python(folder) else root / "shared/typescript"


def own_modules(folder: Path) -> list[Path]:
    """The Python files of a folder that were written for it: no copies, no environments."""
    inside = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return sorted(folder / path for path in inside if not any(p == VENDORED or p[0] == "." for p in path.parts[:-1]))


def manifest(root: Path, folder: Path) -> list[str]:
    """The shared modules `folder` vendors, Python's `__init__.py` always among them. Raises `ManifestError`."""
    sources = shared_sources(root, folder)
    if is_python(folder):
        where, example = "pyproject.toml", '[tool.sandboxes] shared = ["errors.py", ...]'
        declared = _project(folder).get("tool", {}).get("sandboxes", {})
    else:
        where, example = "package.json", '"sandboxes": {"shared": ["errors.ts", ...]}'
        declared = json.loads((folder / "package.json").read_text(encoding="utf-8")).get("sandboxes", {})
    where = f"{folder.relative_to(root)}/{where}"
    names = declared.get("shared")
    if not names:
        raise ManifestError(f"{where} has no `{example}`")
    for name in names:
        if Path(name).name != name or not (sources / name).is_file():
            raise ManifestError(f"{where} vendors {name}, which is no file in {sources.relative_to(root)}/")
    return sorted({*names, *(["__init__.py"] if is_python(folder) else [])})


def vendored(root: Path, folder: Path) -> dict[str, bytes]:
    """What `_shared/` must hold: file name -> content. VERSION has no date: the same sources give the same bytes."""
    sources = shared_sources(root, folder)
    files = {name: (sources / name).read_bytes() for name in manifest(root, folder)}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    version = _project(root)["project"]["version"]
    return files | {"VERSION": f"sandboxes {version}\nsha256 {digest.hexdigest()}\n".encode()}


def sync(root: Path) -> Iterator[str]:
    """Writes every folder's copies and table; yields a line for each file it changed."""
    for folder in vendoring(root):
        expected, target = vendored(root, folder), folder / VENDORED
        if not _is_plain_directory(target):
            _remove(target)
            target.mkdir()
        for path in _strays(target, expected):
            _remove(path)
            yield f"removed {path.relative_to(root)}"
        for name, content in expected.items():
            source, copy = shared_sources(root, folder) / name, target / name
            if _difference(source, copy, content):
                _remove(copy)
                copy.write_bytes(content)
                copy.chmod(_mode(source))
                yield f"wrote {copy.relative_to(root)}"
        if text := _new_readme(root, folder):
            (folder / "README.md").write_text(text, encoding="utf-8")
            yield f"filled {folder.relative_to(root)}/README.md"


def stale_copies(root: Path) -> Iterator[str]:
    """Everything `make sync` would change in the `_shared/` directories, one line each."""
    for folder in vendoring(root):
        expected, target = vendored(root, folder), folder / VENDORED
        if not _is_plain_directory(target):
            yield f"{target.relative_to(root)} is not a directory of copies"
            continue
        for path in _strays(target, expected):
            yield f"{path.relative_to(root)} does not belong there"
        for name, content in expected.items():
            if difference := _difference(shared_sources(root, folder) / name, target / name, content):
                yield f"{(target / name).relative_to(root)} {difference}"


def stale_tables(root: Path) -> Iterator[str]:
    """The READMEs whose settings table `make sync` would change."""
    for folder in [*folders(root), *typescript_folders(root)]:
        if _new_readme(root, folder):
            yield f"{folder.relative_to(root)}/README.md has an old settings table"


def open_imports(root: Path) -> Iterator[str]:
    """Imports that leave the vendored set: the copied folder would not start."""
    for folder in [*folders(root), *image_folders(root)]:
        names = manifest(root, folder)
        wanted = [
            (path, f"{name}.py") for path in (root / "shared" / name for name in names) for name in _siblings(path)
        ]
        wanted += [(path, f"{name}.py") for path in own_modules(folder) for name in _copies(path)]
        yield from _outside(root, folder / "pyproject.toml", names, wanted)
    for folder in typescript_folders(root):
        names = manifest(root, folder)
        shared = [shared_sources(root, folder) / name for name in names if name.endswith(".ts")]
        wanted = [(path, name) for path in shared for name in _typescript_imports(path, "./")]
        wanted += [
            (path, name) for path in own_scripts(folder) for name in _typescript_imports(path, f"../{VENDORED}/")
        ]
        yield from _outside(root, folder / "package.json", names, wanted)


def _outside(root: Path, where: Path, names: list[str], wanted: list[tuple[Path, str]]) -> Iterator[str]:
    for path, name in wanted:
        if name not in names:
            imported = name.removesuffix(".py")
            yield (
                f"{path.relative_to(root)} imports {imported}: add {name} to the manifest in {where.relative_to(root)}"
            )


def own_scripts(folder: Path) -> list[Path]:
    """The TypeScript files of a folder that were written for it."""
    return sorted(path for part in ("src", "test") for path in (folder / part).rglob("*.ts"))


def _typescript_imports(path: Path, prefix: str) -> list[str]:
    """The files that a module imports or re-exports from one directory, in the order of their lines."""
    return re.findall(
        rf"""(?:from|import)\s*\(?["']{re.escape(prefix)}([^"'/]+)["']""", path.read_text(encoding="utf-8")
    )


def _siblings(path: Path) -> set[str]:
    """The sibling modules a shared module imports: `from .x import y`, `from . import x`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def _copies(path: Path) -> set[str]:
    """The vendored modules a folder's own file imports: `from _shared.x import y`, `from _shared import x`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith(f"{VENDORED}.")}
    return found


def _is_plain_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _strays(target: Path, expected: dict[str, bytes]) -> list[Path]:
    """What is in `target` and should not be. Python's own caches are not ours to judge."""
    return sorted(path for path in target.iterdir() if path.name not in {*expected, "__pycache__"})


def _difference(source: Path, copy: Path, content: bytes) -> str | None:
    if copy.is_symlink() or not copy.is_file():
        return "is not a plain file" if copy.is_symlink() or copy.exists() else "is missing"
    if copy.read_bytes() != content:
        where = "shared" if source.parent.name == "shared" else f"shared/{source.parent.name}"
        return f"differs from {where}/{source.name}" if source.is_file() else "does not name what is vendored"
    if _mode(copy) != _mode(source):
        return f"has mode {_mode(copy):o}, not {_mode(source):o}"
    return None


def _mode(path: Path) -> int:
    """The mode as git keeps it, 755 or 644; the rest is the umask of whoever checked the tree out."""
    return 0o755 if path.is_file() and path.stat().st_mode & stat.S_IXUSR else 0o644


def _remove(path: Path) -> None:
    if _is_plain_directory(path):
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _new_readme(root: Path, folder: Path) -> str | None:
    """The folder's README with today's settings table; None when it has that one already, or there is no README."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    old = readme.read_text(encoding="utf-8")
    new = settings_tables.filled(old, settings_tables.rows(root, folder))
    if new is None:
        raise ManifestError(
            f"{readme.relative_to(root)} must have {settings_tables.BEGIN} and {settings_tables.END}, once each"
        )
    return None if new == old else new


def _project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sync_shared", description="Vendors shared/ (make sync).")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when something would change")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    root: Path = options.root.resolve()
    stale: list[str] = []
    broken = [*pins.problems(root), *pins.npm_problems(root)]
    try:
        if not options.check:
            for line in sync(root):
                print(line)
        # A table is read by importing the folder, which tells nothing while its copies are not in order.
        stale = list(stale_copies(root)) or list(stale_tables(root))
        broken += open_imports(root)
    except (ManifestError, settings_tables.SettingsUnreadable) as error:
        broken.append(str(error))
    for line in [*broken, *stale, *([FIX] if stale else [])]:
        print(line, file=sys.stderr)
    return 1 if broken or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
