"""Pins: exact, and the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools import trees
from tools import pins, sync_shared


def test_equal_exact_pins_pass(tmp_path: Path) -> None:
    trees.make(tmp_path)
    assert list(pins.problems(tmp_path)) == []


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        ("anthropic==2.1", "pins anthropic==2.1, pyproject.toml pins 2.0"),
        ("anthropic[webhooks]==2.1", "pins anthropic==2.1, pyproject.toml pins 2.0"),
        ("Anthropic==2.1", "pins anthropic==2.1, pyproject.toml pins 2.0"),
        ("anthropic>=2.0", "is not pinned exactly"),
        ("anthropic", "is not pinned exactly"),
        ("anthropic==2.*", "is not pinned exactly"),
        ("fastapi==1.0", "its uv.lock has None"),
    ],
)
def test_other_pins_are_found(tmp_path: Path, requirement: str, problem: str) -> None:
    project = trees.make(tmp_path) / "pyproject.toml"
    project.write_text(project.read_text(encoding="utf-8").replace("anthropic==2.0", requirement), encoding="utf-8")
    assert problem in "\n".join(pins.problems(tmp_path))


def test_a_lock_that_resolves_something_else_is_found(tmp_path: Path) -> None:
    lock = trees.make(tmp_path) / "uv.lock"
    lock.write_text(lock.read_text(encoding="utf-8").replace('"2.0"', '"1.9"'), encoding="utf-8")
    assert "its uv.lock has 1.9" in "\n".join(pins.problems(tmp_path))


def test_the_check_asks_for_pins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trees.make(tmp_path)
    trees.write(folder / "uv.lock", 'version = 1\n[[package]]\nname = "anthropic"\nversion = "1.9"\n')
    assert sync_shared.main(["--root", str(tmp_path)]) == 1
    assert "uv.lock has 1.9" in capsys.readouterr().err
