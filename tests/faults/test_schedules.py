"""Random schedules hold every invariant; the ones that once did not are played again; and the suite repeats itself."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest

from tests.faults import kept, steps
from tests.faults.__main__ import SEEDS_APART, report
from tests.faults.generate import DISPATCHER_STEPS, ORDINARY, RUNNER_STEPS, every_kill, generate
from tests.faults.play import play
from tests.faults.shrink import shrink
from tests.faults.steps import Create, KillDispatcher, KillRunner, Message, Schedule, Skew, Use

COUNT = int(os.environ.get("FAULTS_N", "500"))
SEED = int(os.environ.get("FAULTS_SEED", "0"))
CHUNK = 20
KEPT = [module.name for module in pkgutil.iter_modules(kept.__path__)]


@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
def test_random_schedules(first: int) -> None:
    for number in range(first, min(first + CHUNK, COUNT)):
        outcome = play(generate(SEED * SEEDS_APART + number))
        if outcome.violations:
            pytest.fail(report(outcome), pytrace=False)


@pytest.mark.parametrize("name", KEPT)
def test_what_was_once_found(name: str) -> None:
    outcome = play(importlib.import_module(f"{kept.__name__}.{name}").SCHEDULE)
    assert outcome.violations == [], "\n".join(outcome.story)


@pytest.mark.parametrize("part", range(2))
def test_a_kill_at_any_await_loses_nothing(part: int) -> None:
    """Every eighth here; `make faults` plays them all."""
    for schedule in list(every_kill())[part * 4 :: 8]:
        outcome = play(schedule)
        assert outcome.violations == [], "\n".join((str(schedule), *outcome.story))


def test_the_kills_reach_the_last_await() -> None:
    undisturbed = play(ORDINARY).story
    for kill in (KillRunner(0.6, 0, RUNNER_STEPS), KillDispatcher(0.6, 0, DISPATCHER_STEPS, 30.0)):
        disturbed = play(ORDINARY.with_steps((*ORDINARY.steps, kill))).story
        assert [line for line in disturbed if "Kill" not in line] == undisturbed


def test_a_schedule_plays_the_same_again() -> None:
    for seed in range(5):
        first, second = play(generate(seed)), play(generate(seed))
        assert (first.violations, first.story) == (second.violations, second.story)


def test_a_schedule_prints_as_python() -> None:
    schedule = generate(7)
    assert eval(str(schedule), dict(vars(steps))) == schedule  # noqa: S307 - our own text


def test_a_failure_shrinks_to_what_it_needs() -> None:
    needed = Skew(5.0, 45.0)
    turns = (((Use(),),),)
    schedule = Schedule(1, 4, (("stop_reply", 204),), (Create(1.0, 0, turns), Message(2.0, 0), needed, Message(9.0, 0)))
    small = shrink(schedule, lambda candidate: needed in candidate.steps)
    assert small == Schedule(1, 1, (), (needed,))
