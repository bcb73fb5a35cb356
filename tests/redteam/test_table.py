"""The table of attempts and the providers' statements: complete, true to the files, and stale when they change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.redteam import __main__ as command
from tests.redteam import file_suite, suite
from tests.redteam.attempts import ATTEMPTS, FILE_ATTEMPTS, NAMES
from tests.redteam.statements import DIRECTORY, Statement, StatementError, read
from tests.redteam.table import BEGIN, END, table

PROVIDERS = [path.stem for path in DIRECTORY.glob("*.toml")]


def test_every_attempt_is_there_once_and_has_its_code() -> None:
    assert len(set(NAMES)) == len(ATTEMPTS)
    code = suite.HOSTILE.read_text(encoding="utf-8")
    attempts = {name.replace("_", "-") for name in re.findall(r"@attempt\ndef (\w+)", code)}
    assert attempts == (suite.INSIDE | suite.LATER | {f"arm-{name}" for name in suite.LATER})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_statements_are_of_a_folder_and_proven_by_a_suite(provider: str) -> None:
    tests = Path(__file__).resolve().parents[1] / "providers"
    assert (tests.parents[1] / "providers" / provider).is_dir()
    suites = [path for path in tests.glob("test_*.py") if f'provider = "{provider}"' in path.read_text("utf-8")]
    assert suites
    assert all("RedTeam" in path.read_text("utf-8") for path in suites)


def test_what_a_file_does_not_name_is_defended(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[not_tried]]\nwhy = "No cloud here."\nattempts = ["metadata"]\n')
    stated = read("mine", tmp_path)
    assert stated["metadata"] == Statement("not_tried", "No cloud here.")
    assert {stated[name].outcome for name in NAMES if name != "metadata"} == {"defended"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[not_tried]]\nattempts = ['metadata']", "needs `why` and `attempts`"),
        ("[[not_tried]]\nwhy = ''\nattempts = ['metadata']", "needs `why` and `attempts`"),
        ("[[not_tried]]\nwhy = 'x'\nattempts = ['meta']", "meta is no attempt"),
        ("[[not_tried]]\nwhy = 'x'\nattempts = ['disk', 'disk']", "disk is there twice"),
        ("[[defended]]\nwhy = 'x'\nattempts = ['disk']", "defended: expected"),
        ("[[", "mine.toml: "),
        ("sandbox = 'none'", "expected one of commands, files"),
        ("sandbox = 'files'\n[[not_tried]]\nwhy = 'x'\nattempts = ['metadata']", "metadata is no attempt"),
    ],
)
def test_a_statement_that_cannot_be_understood_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(StatementError, match=words):
        read("mine", tmp_path)


def test_the_table_has_a_row_per_attempt_a_column_per_provider_and_each_reason_once(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text('[[not_defended]]\nwhy = "It is open."\nattempts = ["loopback", "metadata"]\n')
    (tmp_path / "two.toml").write_text('[[not_tried]]\nwhy = "It is far."\nattempts = ["metadata"]\n')
    lines = table(tmp_path).splitlines()
    assert lines[0] == "| An agent tries to | one | two |"
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines if line.count(" | ") == 2}
    goals = {attempt.name: attempt.goal for attempt in ATTEMPTS}
    assert set(goals.values()) <= rows.keys()
    assert rows[goals["loopback"]] == ["**not defended** (1)", "defended |"]
    assert rows[goals["metadata"]] == ["**not defended** (1)", "not tried (2) |"]
    assert lines[-2:] == ["1. one: It is open.", "2. two: It is far."]


def test_sandboxes_without_a_shell_have_a_table_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text('[[not_tried]]\nwhy = "It is far."\nattempts = ["metadata"]\n')
    files = 'sandbox = "files"\n[[not_defended]]\nwhy = "It is open."\nattempts = ["paths"]\n'
    (tmp_path / "two.toml").write_text(files)
    lines = table(tmp_path).splitlines()
    heads = [at for at, line in enumerate(lines) if line.startswith("| An agent tries to")]
    assert [lines[at] for at in heads] == ["| An agent tries to | one |", "| An agent tries to | two |"]
    first, second = lines[: heads[1]], lines[heads[1] :]
    assert {f"| {attempt.goal} |" for attempt in FILE_ATTEMPTS} == {
        line.removesuffix(" defended |").removesuffix(" **not defended** (2) |")
        for line in second
        if "defended" in line
    }
    assert sum("defended" in line or "not tried" in line for line in first) == len(ATTEMPTS)
    assert lines[-2:] == ["1. one: It is far.", "2. two: It is open."]


def test_every_attempt_without_a_shell_has_its_code() -> None:
    assert {attempt.name for attempt in FILE_ATTEMPTS} == set(file_suite.TRIES)


def test_an_old_table_is_found_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "SECURITY.md"
    page.write_text(f"# Before\n{BEGIN}\nold\n{END}\nAfter\n")
    assert command.main(["--check"], page) == 1
    assert "Fix: make sync" in capsys.readouterr().err
    assert command.main([], page) == 0
    assert command.main(["--check"], page) == 0
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\nAfter\n")
    page.write_text("no markers")
    assert command.main([], page) == 1
