"""The README and the tables agree with the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import tools.emulator
from tools.emulator import Emulator, Switches
from tools.emulator.credentials import MATRIX
from tools.emulator.routes import ROUTES

README = (Path(tools.emulator.__file__).parent / "README.md").read_text()


def section(name: str) -> str:
    return README.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]


def test_the_limits_come_first() -> None:
    assert re.findall(r"^## (.+)$", README, re.MULTILINE)[0] == "Limits"


def test_the_switches_are_the_documented_ones() -> None:
    hints = get_type_hints(Switches)
    expected = {}
    for each in fields(Switches):
        values = get_args(hints[each.name]) or (True, False)
        assert each.default == values[0]
        expected[each.name] = [str(value) for value in values]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", section("Switches"), re.MULTILINE)
    assert {name: re.findall(r"`(\w+)`", values) for name, values in rows} == expected


def test_the_documented_members_exist() -> None:
    table = section("In Python")
    names = re.findall(r"`(\w+)(?:\([^`]*\))?`", "\n".join(re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)))
    assert len(names) > 20
    emulator = Emulator()
    missing = [name for name in names if name != "url" and not hasattr(emulator, name)]
    assert missing == []


def test_the_matrix_names_operations_that_exist() -> None:
    assert set(MATRIX) <= {operation for _, _, operation, _ in ROUTES}
