"""The settings tables of the READMEs, generated from the dataclasses that read the settings.

A folder's modules are imported in a process of their own with the folder in front of the path, as its platform would:
every folder has a `sandbox.py`, so two of them cannot live in one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BEGIN = "<!-- settings:begin -->"
END = "<!-- settings:end -->"

# argv: the root, the folder. Prints the settings as JSON, their defaults as one would type them.
_LOADER = """
import dataclasses, importlib, json, pathlib, sys
root, folder = map(pathlib.Path, sys.argv[1:])
sys.path[:0] = [str(folder), str(root)]
def declared(module):
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls):
            yield from (f for f in dataclasses.fields(cls) if {"name", "help"} <= f.metadata.keys())
served = ["shared.server"] if (folder / "_shared/server.py").is_file() else []
own = [p.stem for p in sorted(folder.glob("*.py")) if "setting(" in p.read_text("utf-8")]
modules = ["shared.settings", *served, *own]
found = {}
for f in (f for name in modules for f in declared(importlib.import_module(name))):
    required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    default = None if required else f.default if f.default is not dataclasses.MISSING else f.default_factory()
    text = ("true" if default else "false") if isinstance(default, bool) else "" if default in (None, ()) else (
        f"{default:g}" if isinstance(default, float) and default < 1e6 else str(default))
    found.setdefault(f.metadata["name"], {"name": f.metadata["name"], "help": f.metadata["help"],
        "old_name": f.metadata.get("old_name"), "required": required, "default": text})
print(json.dumps(list(found.values())))
"""


class SettingsUnreadable(Exception):
    """A folder's settings could not be loaded."""


@dataclass(frozen=True)
class Row:
    """One setting as the table shows it."""

    name: str
    help: str
    old_name: str | None
    required: bool
    default: str


def rows(root: Path, folder: Path) -> list[Row]:
    """The shared settings and the folder's own, the required ones first. Raises `SettingsUnreadable`."""
    if not (folder / "pyproject.toml").is_file():
        return _typescript_rows(root, folder)
    # -I: no PYTHON* variables, no user site, no current directory. -B: no __pycache__ in a folder that people copy.
    run = subprocess.run(
        [sys.executable, "-I", "-B", "-c", _LOADER, str(root), str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise SettingsUnreadable(f"{folder.relative_to(root)}: its settings cannot be loaded: {reason}")
    return sorted((Row(**row) for row in json.loads(run.stdout)), key=lambda row: not row.required)


def _typescript_rows(root: Path, folder: Path) -> list[Row]:
    """A TypeScript folder declares its settings as data, in files that its code reads too."""
    declared: list[dict[str, str]] = []
    for path in (root / "shared/typescript/settings.json", folder / "src/settings.json"):
        try:
            declared += json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsUnreadable(f"{path.relative_to(root)}: its settings cannot be loaded: {error}") from error
    settings = [
        Row(each["name"], each["help"], each.get("old_name"), "default" not in each, each.get("default", ""))
        for each in declared
    ]
    return sorted(settings, key=lambda row: not row.required)


def table(settings: list[Row]) -> str:
    """The Markdown between the two markers."""
    lines = ["| Setting | Default | Meaning |", "| --- | --- | --- |"]
    for row in settings:
        default = "required" if row.required else f"`{row.default}`" if row.default else ""
        old = f" The old name `{row.old_name}` still works, with a warning." if row.old_name else ""
        lines.append(f"| `{row.name}` | {default} | {row.help.replace('|', chr(92) + '|')}{old} |")
    return "\n".join(lines)


def filled(readme: str, settings: list[Row]) -> str | None:
    """`readme` with its table written anew; None when it does not have the two markers, once each and in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        return None
    return f"{before}{BEGIN}\n{table(settings)}\n{END}{after}"
