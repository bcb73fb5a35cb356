"""Scenarios: a YAML file that sets an emulator up, creates sessions and tells their story, with checks on the way.

Reading one runs no code. A worker is not part of it: the story waits for whatever worker serves the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from .agents import Step
from .emulator import Emulator
from .errors import Invalid
from .params import Params, parse
from .plot import Action, PlotError, actions_of
from .scripts_yaml import REPETITION, filled, steps_of, unfilled
from .switches import Switches

SHIPPED = Path(__file__).parent / "scenarios"


class SessionPart(Params):
    title: str | None = None
    script: list[Any] = Field(default_factory=list)
    copies: int = Field(default=1, ge=1, le=10_000)
    claimed: bool = False
    """By a worker that dies right after its first beat, before any other can poll."""


class File(Params):
    about: str = Field(min_length=1)
    vars: dict[str, Any] = Field(default_factory=dict)
    switches: dict[str, Any] = Field(default_factory=dict)
    script: list[Any] = Field(default_factory=list)
    """Of sessions that others create; those of the scenario have their own."""
    sessions: dict[str, SessionPart] = Field(default_factory=dict)
    plot: list[Any] = Field(default_factory=list)


@dataclass(frozen=True)
class Scenario:
    name: str
    about: str
    switches: Mapping[str, Any]
    script: list[Step]
    sessions: Mapping[str, SessionPart]
    scripts: Mapping[str, list[Step]]
    plot: list[Action]


@dataclass
class Report:
    """How it went: nothing in `failures` means that everything was as told."""

    scenario: str
    failures: list[str] = field(default_factory=list)

    @property
    def has_passed(self) -> bool:
        return not self.failures


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load(name: str | Path, variables: Mapping[str, Any] | None = None) -> Scenario:
    """A shipped scenario by its name, or one of yours by its path; ValueError with the place that is wrong in it."""
    path = SHIPPED / f"{name}.yaml" if str(name) in shipped() else Path(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"scenario {name}: no such file, and not one of {', '.join(shipped())}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"scenario {name}: not YAML: {error}") from error
    try:
        return _read(path.stem, data, variables or {})
    except Invalid as error:
        raise ValueError(f"scenario {name}: {error.message}") from error
    except ValueError as error:
        raise ValueError(f"scenario {name}: {error}") from error


def _read(name: str, data: Any, variables: Mapping[str, Any]) -> Scenario:
    known = data.get("vars") if isinstance(data, dict) else None
    known = known if isinstance(known, dict) else {}
    unknown = set(variables) - set(known)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not among its vars ({', '.join(known) or 'it has none'})")
    filled_in = filled(data, {**known, **variables})
    if left := unfilled(filled_in) - {REPETITION}:
        raise ValueError(f"{', '.join(sorted(left))}: in double braces, but not among its vars")
    file = parse(File, filled_in, "scenario")
    Switches().change(file.switches)
    plot = actions_of(file.plot, "plot")
    for action in plot:
        if action.session is not None and action.session not in file.sessions:
            raise ValueError(f"{action.where}: no session {action.session} in {', '.join(file.sessions) or 'none'}")
    scripts = {key: steps_of(part.script, f"sessions.{key}.script") for key, part in file.sessions.items()}
    return Scenario(name, file.about, file.switches, steps_of(file.script, "script"), file.sessions, scripts, plot)


class Player:
    """One performance of a scenario on an emulator."""

    def __init__(self, emulator: Emulator, scenario: Scenario) -> None:
        self._emulator = emulator
        self._scenario = scenario
        self.sessions: dict[str, list[str]] = {}
        """Ids by the names of the scenario, once it is prepared."""

    def prepare(self) -> None:
        """Switches, scripts and sessions; then workers may come."""
        self._emulator.switch(**self._scenario.switches)
        self._emulator.default_script = self._scenario.script
        for name, part in self._scenario.sessions.items():
            self.sessions[name] = [self._create(name, part) for _ in range(part.copies)]

    def _create(self, name: str, part: SessionPart) -> str:
        with self._emulator.hold():
            session_id = self._emulator.create_session(part.title or name)
            self._emulator.set_script(session_id, self._scenario.scripts[name])
            if part.claimed:
                self._emulator.claim_and_die(session_id)
        return session_id

    def play(self) -> Report:
        """Tell the story up to its end or to the first step that goes wrong. Blocks; workers are served meanwhile."""
        report = Report(self._scenario.name)
        try:
            for action in self._scenario.plot:
                action.do(self._emulator, self.sessions)
        except PlotError as error:
            report.failures.append(str(error))
        told = "\n".join(report.failures)  # a step that waited for the session has said it already
        report.failures += [each for each in self._emulator.failed_expectations() if each not in told]
        return report


def perform(emulator: Emulator, scenario: Scenario) -> Report:
    player = Player(emulator, scenario)
    player.prepare()
    return player.play()
