"""Random schedules hold every invariant; the ones that once did not are played again; and the suite repeats itself."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import pkgutil
from collections.abc import AsyncIterator
from typing import get_args

import pytest

from tests.faults import kept, steps
from tests.faults.__main__ import SEEDS_APART, report
from tests.faults.generate import (
    EVERY_KILL,
    IN_A_CALL,
    LONG_CALL,
    ORDINARY,
    Kills,
    every_kill,
    every_server,
    generate,
)
from tests.faults.loop import VirtualLoop, virtual_time
from tests.faults.play import label, play
from tests.faults.shrink import shrink
from tests.faults.steps import (
    Create,
    Message,
    Provider,
    Schedule,
    Skew,
    Suspend,
    Use,
    Webhooks,
    Wire,
)
from tests.faults.wire import Kind
from tools.emulator.switches import values_of

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
    module = importlib.import_module(f"{kept.__name__}.{name}")
    outcome = play(module.SCHEDULE)
    assert outcome.violations == [], "\n".join(outcome.story)
    assert {label(text) for text in outcome.excused} == getattr(module, "EXCUSED", set())


@pytest.mark.parametrize("part", range(2))
def test_a_kill_at_any_await_loses_nothing(part: int) -> None:
    """Every seventeenth of them in all; `make faults` plays the others too."""
    for schedule in list(every_kill())[part * 17 :: 34]:
        outcome = play(schedule)
        assert outcome.violations == [], "\n".join((str(schedule), *outcome.story))


@pytest.mark.parametrize("kills", EVERY_KILL, ids=lambda kills: repr(kills.at(0)).partition("(")[0])
def test_the_kills_reach_the_first_await_and_the_last(kills: Kills) -> None:
    """The first one changes what happens, and one more than there are would not."""

    def story(schedule: Schedule) -> list[str]:
        lines = [line for line in play(schedule).story if float(line.split()[0]) < kills.until]
        return [line for line in lines if not line.endswith(repr(schedule.steps[-1]))]

    undisturbed = story(kills.of.with_steps((*kills.of.steps, steps.SaveStore(kills.at(0).at))))
    assert story(kills.schedule(kills.count)) == undisturbed
    assert story(kills.schedule(0)) != undisturbed or kills.of is ORDINARY  # where nothing runs yet


def test_trouble_in_a_call_loses_nothing_on_any_server() -> None:
    """Every eleventh here; `make faults` plays them all."""
    for schedule in list(every_server())[::11]:
        outcome = play(schedule)
        assert outcome.violations == [], "\n".join((str(schedule), *outcome.story))


def test_the_trouble_in_a_call_meets_one() -> None:
    times = {line.split("  ")[-1]: float(line.split()[0]) for line in play(LONG_CALL).story}
    assert times["runner 1 executes s0t0g0c0"] + 5.0 < IN_A_CALL < times["runner 1 is done with s0t0g0c0"] - 5.0


def test_every_kind_of_trouble_is_in_the_schedules() -> None:
    """Those that `make test` plays: every step, every value of every switch, every trouble of the provider's, and every
    trouble of the answers that the lease depends on."""
    schedules = [generate(seed) for seed in range(500)]
    made = [step for schedule in schedules for step in schedule.steps]
    assert {type(step) for step in made} == set(steps.Step.__subclasses__())
    assert {schedule.hosts for schedule in schedules} == {2, 3, 4}
    not_default = {(name, value) for name, (_, *values) in values_of().items() for value in values}
    assert {switch for schedule in schedules for switch in schedule.switches} == not_default
    assert {step.kind for step in made if isinstance(step, Webhooks)} == {"lose", "delay", "duplicate", "reorder"}
    assert {(step.call, step.kind) for step in made if isinstance(step, Provider)} == {
        *(("acquire", kind) for kind in ("slow", "fail", "half_done", "forget")),
        *(("start", kind) for kind in ("slow", "slow_boot", "fail", "fail_for_good", "half_done", "lie")),
        *((call, kind) for call in ("list", "release") for kind in ("slow", "fail")),
    }
    wires = [step for step in made if isinstance(step, Wire)]
    assert {(step.operation, step.kind) for step in wires if step.who == "runner"} >= {
        (operation, kind)
        for operation in ("work.ack", "work.heartbeat", "work.stop", "events.send")
        for kind in get_args(Kind)
        if kind != "fail"
    }
    assert {(step.operation, step.status) for step in wires if step.count == 3} >= {("sessions.get", 500)}
    assert {step.status for step in wires} == {500, 503, 529, 429, 408}
    assert {step.seconds for step in made if isinstance(step, Suspend)} >= {20.0, 400.0, 700.0}


def test_a_schedule_plays_the_same_again() -> None:
    for seed in range(5):
        first, second = play(generate(seed)), play(generate(seed))
        assert (first.violations, first.story) == (second.violations, second.story)


def test_what_a_schedule_leaves_is_collected() -> None:
    play(generate(0))
    before = gc.get_freeze_count()
    play(generate(1))
    assert gc.get_freeze_count() == before


def test_a_process_is_reaped_while_it_closes_a_generator() -> None:
    """What nobody has read to its end is closed by a task of the loop's own making."""
    closed: list[str] = []

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            closed.append("closed")

    async def begin(generators: list[AsyncIterator[int]]) -> None:
        await anext(generators[0])

    async def main() -> None:
        process = loop.process("runner 1")
        left = [endless()]
        await process.spawn(begin(left))
        process.context.run(left.clear)
        await asyncio.sleep(0)
        await process.reap()

    loop = VirtualLoop()
    with virtual_time(loop):
        loop.run_until_complete(main())
    loop.close()
    assert closed == ["closed"]


def test_a_schedule_prints_as_python() -> None:
    schedule = generate(7)
    assert eval(str(schedule), dict(vars(steps))) == schedule  # noqa: S307 - our own text


def test_a_failure_shrinks_to_what_it_needs() -> None:
    needed = Skew(5.0, 45.0)
    turns = (((Use(),),),)
    schedule = Schedule(1, 4, (("stop_reply", 204),), (Create(1.0, 0, turns), Message(2.0, 0), needed, Message(9.0, 0)))
    small = shrink(schedule, lambda candidate: needed in candidate.steps)
    assert small == Schedule(1, 1, (), (needed,))
