"""The README and the tables agree with the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

import tools.emulator
from tools.emulator import AdminClient, Emulator, Switches, WebhookFault, admin_params, faults, load_scenario, plot
from tools.emulator.admin import TABLE
from tools.emulator.credentials import MATRIX
from tools.emulator.flags import parser
from tools.emulator.params import Params
from tools.emulator.routes import ROUTES
from tools.emulator.scenario import shipped
from tools.emulator.scripts_yaml import steps_of
from tools.emulator.webhook_faults import WebhookFaultKind

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
    emulator = Emulator()
    members = {name for name in [*vars(emulator), *dir(Emulator)] if not name.startswith("_")}
    # Told elsewhere: `start` and `stop` are what `with` does, `clock` is an argument, `until` is the server's own.
    assert set(names) == members - {"start", "stop", "clock", "until"}


def test_the_matrix_names_operations_that_exist() -> None:
    assert set(MATRIX) <= {operation for _, _, operation, _ in ROUTES}


# Trouble and stories


def column(table: str, number: int = 1) -> list[str]:
    """The code in one column of a section's tables, row by row."""
    rows = re.findall(r"^\| (`.+) \|$", section(table), re.MULTILINE)
    return [re.findall(r"`([^`]+)`", row.split(" | ")[number - 1])[0] for row in rows]


def test_the_faults_are_the_documented_ones() -> None:
    assert set(column("Faults")) == {*get_args(faults.Kind), *get_args(WebhookFaultKind)}
    for parameter in [*fields(faults.Fault), *fields(WebhookFault)]:
        assert f"`{parameter.name}" in section("Faults") + section("Admin API"), parameter.name


def test_the_admin_routes_are_the_documented_ones() -> None:
    assert column("Admin API") == [f"{method} {path}" for method, path, _ in TABLE]


def test_the_fields_of_admin_requests_are_documented() -> None:
    models = [value for value in vars(admin_params).values() if isinstance(value, type) and issubclass(value, Params)]
    names = {name for model in models for name in model.model_fields}
    assert len(names) > 15
    text = section("Admin API")
    assert {name for name in names if not re.search(rf"[`?&]{name}\b", text)} == set()


def test_the_shipped_scenarios_are_the_documented_ones() -> None:
    assert sorted(column("Scenarios")) == shipped()


def test_the_steps_of_plots_and_scripts_are_documented() -> None:
    listed = section("Scenarios").split("Steps of a plot:", 1)[1]
    assert [name for name in plot.NAMES if f"`{name}`" not in listed] == []
    spelled = yaml.safe_load("[" + ", ".join(_example(data) for data in column("Scripts", 2)) + "]")
    assert len(steps_of(spelled)) > len(spelled)  # the loop


def _example(data: str) -> str:
    """A row of the table with something in place of what it leaves open."""
    for given, instead in (("steps: […]", "steps: [end]"), ("{NAME: {…}}", "{x: {}}"), ("{call: {…}}", "{bash: x}")):
        data = data.replace(given, instead)
    return "{" + data.replace("…", "x") + "}" if ": " in data else data


def test_the_example_of_a_scenario_can_be_told(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.+?)```", section("Scenarios"), re.DOTALL)
    path = tmp_path / "example.yaml"
    path.write_text(example)
    places = [action.where for action in load_scenario(path).plot]
    assert places == ["plot.0 (fault)", "plot.1 (say)", "plot.2 (wait)", "plot.3 (check)"]


def test_the_flags_are_documented() -> None:
    flags = {flag for action in parser()._actions for flag in action.option_strings if flag.startswith("--")}
    told_by_help = {"--host", "--environment-id", "--environment-key", "--api-key", "--webhook-key"}
    assert {flag for flag in flags - told_by_help if flag not in README} == set()


def test_the_client_has_the_names_of_the_emulator() -> None:
    names = {name for name in vars(AdminClient) if not name.startswith("_")}
    own = {"close", "pause_webhooks", "set_default_script", "state", "webhooks"}
    assert {name for name in names if not hasattr(Emulator(), name)} == own
