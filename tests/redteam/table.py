"""SECURITY.md's table: every attempt, and what each provider states of it. The tests prove the statements."""

from __future__ import annotations

from pathlib import Path

from tests.redteam.attempts import ATTEMPTS
from tests.redteam.statements import DIRECTORY, read

BEGIN = "<!-- attempts:begin -->"
END = "<!-- attempts:end -->"


def table(directory: Path = DIRECTORY) -> str:
    """The Markdown between the markers: a column per provider, and the reasons below. Raises `StatementError`."""
    stated = {path.stem: read(path.stem, directory) for path in sorted(directory.glob("*.toml"))}
    reasons: list[str] = []
    lines = [f"| An agent tries to | {' | '.join(stated)} |", f"| --- |{' --- |' * len(stated)}"]
    group = ""
    for attempt in ATTEMPTS:
        if attempt.group != group:
            group = attempt.group
            lines.append(f"| **{group}** |{'  |' * len(stated)}")
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
        lines.append(f"| {attempt.goal} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def filled(page: str, content: str) -> str:
    """`page` with `content` between its markers. Raises `ValueError` where they are not there once each, in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"the page must have {BEGIN} and {END}, once each")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"
