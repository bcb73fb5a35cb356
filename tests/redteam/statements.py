"""What each provider says of each attempt: `stated/<provider>.toml`.

What a file does not name is *defended*. `[[not_defended]]` and `[[not_tried]]` name attempts with the reason; `why` is
a sentence for SECURITY.md. `sandbox = "files"` says that there is no shell, so that another table applies. The suite
runs all but what was not tried, and a statement that is wrong either way fails.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.redteam.attempts import TABLES

DIRECTORY = Path(__file__).with_name("stated")
Outcome = Literal["defended", "not_defended", "not_tried"]


class StatementError(Exception):
    """A file of statements cannot be understood."""


@dataclass(frozen=True)
class Statement:
    outcome: Outcome
    why: str = ""


def sandbox_of(provider: str, directory: Path = DIRECTORY) -> str:
    """Which of `TABLES` applies. Raises `StatementError`."""
    sandbox = str(_load(provider, directory).get("sandbox", "commands"))
    if sandbox not in TABLES:
        raise StatementError(f"{provider}.toml: sandbox = {sandbox!r}: expected one of {', '.join(TABLES)}")
    return sandbox


def read(provider: str, directory: Path = DIRECTORY) -> dict[str, Statement]:
    """Every attempt's statement. Raises `StatementError`, naming the file and what is wrong in it."""
    path = directory / f"{provider}.toml"
    names = [attempt.name for attempt in TABLES[sandbox_of(provider, directory)]]
    tables = {key: value for key, value in _load(provider, directory).items() if key != "sandbox"}
    found: dict[str, Statement] = {}
    outcomes: tuple[Outcome, ...] = ("not_defended", "not_tried")
    if unknown := tables.keys() - set(outcomes):
        raise StatementError(f"{path.name}: {', '.join(sorted(unknown))}: expected [[not_defended]] and [[not_tried]]")
    for outcome in outcomes:
        for entry in tables.get(outcome, []):
            if entry.keys() != {"why", "attempts"} or not entry["why"] or not entry["attempts"]:
                raise StatementError(f"{path.name}: an entry of {outcome} needs `why` and `attempts`, nothing else")
            for name in entry["attempts"]:
                if name not in names:
                    raise StatementError(f"{path.name}: {name} is no attempt: see attempts.py")
                if name in found:
                    raise StatementError(f"{path.name}: {name} is there twice")
                found[name] = Statement(outcome, entry["why"])
    return {name: found.get(name, Statement("defended")) for name in names}


def _load(provider: str, directory: Path) -> dict[str, Any]:
    path = directory / f"{provider}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise StatementError(f"{path.name}: {error}") from error
