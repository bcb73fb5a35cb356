"""`make check`: which steps there are, and that a failing one is seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tools import trees
from tools import check


def test_types_are_checked_in_every_folder_by_itself(tmp_path: Path) -> None:
    folder = trees.make(tmp_path)
    steps = check.steps(tmp_path)
    assert [step.cwd for step in steps if step.name == "types of providers/mine"] == [folder]


@pytest.mark.parametrize(("code", "word"), [(0, "ok"), (3, "FAILED")])
def test_a_step_that_fails_shows_its_output(code: int, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = f"import sys; print('the output'); sys.exit({code})"
    assert check.run(check.Step("a step", [sys.executable, "-c", program])) is (code == 0)
    printed = capsys.readouterr().out
    assert printed.split()[:3] == [word, "a", "step"]
    assert ("the output" in printed) is (code != 0)
