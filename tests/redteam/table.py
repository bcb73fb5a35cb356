"""SECURITY.md's table: every attempt, and what each provider states of it. The tests prove the statements."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.redteam.attempts import TABLES, Attempt
from tests.redteam.statements import DIRECTORY, Statement, read, sandbox_of

BEGIN = "<!-- attempts:begin -->"
END = "<!-- attempts:end -->"
_INTRODUCED = {
    "commands": [],
    "files": ["Where there is no shell, the agent has the file tools and nothing else:", ""],
}


def table(directory: Path = DIRECTORY) -> str:
    """The Markdown between the markers: for each kind of sandbox a table with a column per provider, and the reasons
    below. Raises `StatementError`."""
    providers = sorted(path.stem for path in directory.glob("*.toml"))
    reasons: list[str] = []
    parts = []
    for sandbox, attempts in TABLES.items():
        stated = {name: read(name, directory) for name in providers if sandbox_of(name, directory) == sandbox}
        if stated:
            parts.append("\n".join([*_INTRODUCED[sandbox], *_rows(attempts, stated, reasons)]))
    return "\n\n".join([*parts, "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def _rows(
    attempts: Iterable[Attempt], stated: Mapping[str, Mapping[str, Statement]], reasons: list[str]
) -> Iterator[str]:
    """A table's lines. Takes the reasons down that it refers to."""
    yield f"| An agent tries to | {' | '.join(stated)} |"
    yield f"| --- |{' --- |' * len(stated)}"
    group = ""
    for attempt in attempts:
        if attempt.group != group:
            group = attempt.group
            yield f"| **{group}** |{'  |' * len(stated)}"
        cells = []
        for provider, statements in stated.items():
            statement = statements[attempt.name]
            if statement.outcome == "defended":
                cells.append("defended")
                continue
            reason = f"{provider}: {statement.why}"
            if reason not in reasons:
                reasons.append(reason)
            words = "**not defended**" if statement.outcome == "not_defended" else "not tried"
            cells.append(f"{words} ({reasons.index(reason) + 1})")
        yield f"| {attempt.goal} | {' | '.join(cells)} |"


def filled(page: str, content: str) -> str:
    """`page` with `content` between its markers. Raises `ValueError` where they are not there once each, in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"the page must have {BEGIN} and {END}, once each")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"
