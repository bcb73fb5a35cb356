"""A small tree of our own shape, to be broken by tests."""

from __future__ import annotations

from pathlib import Path

from tools import settings_tables

SETTINGS_MODULE = """
from dataclasses import MISSING, dataclass, field


def setting(name, help, *, default=MISSING, old_name=None):
    return field(default=default, metadata={"name": name, "help": help, "old_name": old_name})


@dataclass(frozen=True)
class Settings:
    base_url: str = setting("BASE_URL", "The API | as the host reaches it.", default="https://api.example")
    wait: float = setting("WAIT_SECONDS", "How long.", default=60.0)
    keep: float = setting("KEEP_SECONDS", "How long to keep.", default=7 * 86400.0)
    loud: bool = setting("LOUD", "Whether.", default=False)
    tools: str | None = setting("TOOLS", "Which.", default=None, old_name="OLD_TOOLS")
"""
SANDBOX = """
from dataclasses import dataclass

from _shared.errors import Broken
from _shared.settings import setting


@dataclass(frozen=True)
class MineSettings:
    token: str = setting("MINE_TOKEN", "The account's token.")
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make(root: Path) -> Path:
    """A tree with one provider folder, `mine`, not yet synced. Returns the folder."""
    write(root / "pyproject.toml", '[project]\nname = "tree"\nversion = "1.2.3"\ndependencies = ["anthropic==2.0"]\n')
    lock = 'version = 1\n[[package]]\nname = "anthropic"\nversion = "2.0"\n'
    write(root / "uv.lock", lock)
    write(root / "shared/__init__.py", "")
    write(root / "shared/errors.py", "class Broken(Exception):\n    pass\n")
    write(root / "shared/settings.py", SETTINGS_MODULE)
    write(root / "shared/jobs.py", "from .errors import Broken\n")
    folder = root / "providers/mine"
    write(
        folder / "pyproject.toml",
        '[project]\nname = "mine"\nversion = "0"\ndependencies = ["anthropic==2.0"]\n'
        '[tool.sandboxes]\nshared = ["errors.py", "jobs.py", "settings.py"]\n',
    )
    write(folder / "uv.lock", lock)
    write(folder / "sandbox.py", SANDBOX)
    write(folder / "README.md", f"# Mine\n\n{settings_tables.BEGIN}\n{settings_tables.END}\n\nThe end.\n")
    return folder


def make_typescript(root: Path) -> Path:
    """The same tree with a TypeScript folder, `yours`, not yet synced. Returns the folder."""
    make(root)
    write(root / "shared/typescript/errors.ts", "export class Broken extends Error {}\n")
    write(root / "shared/typescript/jobs.ts", 'import { Broken } from "./errors.ts";\nexport const kind = Broken;\n')
    write(root / "shared/typescript/settings.json", '[{"name": "BASE_URL", "kind": "url", "help": "The API."}]\n')
    folder = root / "providers/yours"
    write(
        folder / "package.json",
        '{"name": "yours", "dependencies": {"a": "1.0.0"}, "sandboxes": {"shared": ["errors.ts", "jobs.ts"]}}\n',
    )
    write(folder / "package-lock.json", '{"packages": {"node_modules/a": {"version": "1.0.0"}}}\n')
    write(folder / "src/index.ts", 'import { kind } from "../_shared/jobs.ts";\nexport default kind;\n')
    write(folder / "src/settings.json", '[{"name": "KEY", "kind": "text", "help": "A key.", "default": ""}]\n')
    write(folder / "README.md", f"# Yours\n\n{settings_tables.BEGIN}\n{settings_tables.END}\n")
    return folder
