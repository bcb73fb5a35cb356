"""`make check`: lint, format, types and vendoring. Every step runs, so that one look shows all there is to mend."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools.sync_shared import ROOT, folders, image_folders, typescript_folders

PYTHON = sys.executable
EXIT_SKIPPED = 77  # of a step that this machine cannot run; it says why


class Step(NamedTuple):
    name: str
    argv: list[str]
    cwd: Path = ROOT


def steps(root: Path) -> list[Step]:
    """The steps, the slowest first. Types are checked folder by folder: every folder has a `sandbox` module, and two
    of them in one run would be one."""
    config = ["--config-file", str(root / "pyproject.toml")]
    return [
        Step("types of shared, tools, tests", [PYTHON, "-m", "mypy", *config, "shared", "tools", "tests"], root),
        *(
            Step(
                f"types of {folder.relative_to(root)}",
                [
                    PYTHON,
                    "-m",
                    "mypy",
                    *config,
                    "--cache-dir",
                    str(root / ".mypy_cache" / folder.relative_to(root)),
                    ".",
                ],
                folder,
            )
            for folder in [*folders(root), *image_folders(root)]
        ),
        *(
            Step(
                f"types, lint, format of {folder.relative_to(root)}",
                [PYTHON, "-m", "tools.typescript", "check", str(folder)],
                root,
            )
            for folder in typescript_folders(root)
        ),
        Step("lint", [PYTHON, "-m", "ruff", "check", "--quiet", "--output-format", "concise", "."], root),
        Step("format", [PYTHON, "-m", "ruff", "format", "--check", "."], root),
        Step("vendored copies, tables, pins", [PYTHON, "-m", "tools.sync_shared", "--check"], root),
        Step("SECURITY.md's table", [PYTHON, "-m", "tests.redteam", "--check"], root),
    ]


def run(step: Step) -> bool:
    """Runs one step and prints how it went, with its output when it failed."""
    done = subprocess.run(step.argv, cwd=step.cwd, capture_output=True, text=True, check=False)
    word = {0: "ok", EXIT_SKIPPED: "skip"}.get(done.returncode, "FAILED")
    output = "" if word == "ok" else f"{done.stdout}{done.stderr}"
    sys.stdout.write(f"{word:>6}  {step.name}\n{output}")  # one write: steps overlap
    sys.stdout.flush()
    return word != "FAILED"


def main() -> int:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(run, steps(ROOT)))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
