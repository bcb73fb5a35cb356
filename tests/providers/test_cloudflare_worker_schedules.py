"""Seeded fault schedules for the Cloudflare Worker, in real time and real workerd, over HTTP.

For each seed two to four troubles meet a few sessions of two turns each, on the emulator's clock, which jumps whenever
nothing moves. Every call appends its name to the session's file, so that what ran twice is there twice. Then it must
be true that

- every turn is over, and every call was answered once;
- no call was executed twice, what was answered without an error was executed, and nothing else is in the file;
- every item is stopped in the end, and no object has met a mistake of ours.

`tests/provider_schedules.py` is the same for providers that run commands. PROVIDER_SCHEDULES_N plays more seeds,
PROVIDER_SCHEDULES_SEED begins elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from tests.providers.workers_dev import SWEEP_PATH, Seen, WorkersDev, settings_for, workspace
from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, RECLAIM_SECONDS
from tools.emulator import Emulator, call, end, tools

SEEDS = 2
SESSIONS = 3
TURNS = 2
PATIENCE_SECONDS = 150.0
QUIET_SECONDS = 2.0
FILES_KEY = "a-password-of-our-choice"
LEASE_SECONDS = 20
OURS_TO_MEND = re.compile(r"^action=(?:runner|drain) .*$|^action=launch_failed .* error=.*$|Uncaught .*", re.MULTILINE)
MOVES = ("work.ack", "work.stop", "events.send", "events.list", "sessions.get")

pytestmark = pytest.mark.timeout(600)  # the first test of a process may install


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        first = int(os.environ.get("PROVIDER_SCHEDULES_SEED", "0"))
        metafunc.parametrize("seed", range(first, first + int(os.environ.get("PROVIDER_SCHEDULES_N", SEEDS))))


@dataclass
class Talk:
    """One session's turns."""

    seen: Seen
    calls: list[list[str]]
    """The names of each turn's calls."""
    turn: int = -1

    def is_over(self) -> bool:
        return self.turn == len(self.calls) - 1


@dataclass
class Scene:
    """One schedule while it is played."""

    emulator: Emulator
    dev: WorkersDev
    chance: random.Random
    story: list[str] = field(default_factory=list)
    talks: list[Talk] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def tell(self, what: str) -> None:
        self.story.append(f"{time.monotonic() - self.began:6.2f} {what}")

    def restart(self) -> None:
        self.dev.kill()
        self.dev.start()


def _killed(scene: Scene) -> None:
    scene.restart()


def _killed_for_long(scene: Scene) -> None:
    scene.dev.kill()
    scene.emulator.advance(LAPSE_SECONDS)
    scene.dev.start()


def _fails(scene: Scene) -> None:
    operation = scene.chance.choice(
        ["work.poll", "work.ack", "work.stop", "sessions.get", "events.list", "events.stream"]
    )
    scene.emulator.fault(operation, "fail", scene.chance.randint(1, 3), status=scene.chance.choice([500, 503]))


def _answers_lost(scene: Scene) -> None:
    operations = [
        "work.poll",
        "work.ack",
        "events.send",
        "work.stop",
    ]  # a claim's takes 100 s to settle: session.test.ts
    scene.emulator.fault(scene.chance.choice(operations), "lose_response", after=scene.chance.randint(0, 2))


def _requests_lost(scene: Scene) -> None:
    operations = ["work.poll", "events.send", "events.stream"]
    scene.emulator.fault(scene.chance.choice(operations), "drop", scene.chance.randint(1, 2))


def _results_twice(scene: Scene) -> None:
    scene.emulator.fault("events.send", "duplicate", scene.chance.randint(1, 3))


def _slow(scene: Scene) -> None:
    scene.emulator.fault(scene.chance.choice(["work.stop", "events.send", "work.ack"]), "delay", seconds=1.0)


def _stopped_by_an_operator(scene: Scene) -> None:
    talk = scene.chance.choice(scene.talks)
    if talk.seen.state == "active":
        scene.emulator.stop_work(talk.seen.session, force=scene.chance.random() < 0.5)


TROUBLES: dict[str, Callable[[Scene], None]] = {
    "workerd is killed, and starts again": _killed,
    "workerd is gone for longer than a lease": _killed_for_long,
    "the control plane fails for a while": _fails,
    "an answer of the control plane's is lost": _answers_lost,
    "a request is lost": _requests_lost,
    "results arrive twice": _results_twice,
    "the control plane is slow": _slow,
    "an operator stops an item": _stopped_by_an_operator,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Emulator, WorkersDev]]:
    with Emulator(lease_ttl=LEASE_SECONDS) as emulator:
        settings = settings_for(emulator, FILES_KEY=FILES_KEY, SANDBOX_MAX_WAIT_SECONDS="5")
        with WorkersDev(workspace("cloudflare-worker"), tmp_path_factory.mktemp("dev"), settings) as dev:
            emulator.set_webhook_url(f"{dev.url}/webhook")
            yield emulator, dev


def test_schedule(seed: int, served: tuple[Emulator, WorkersDev]) -> None:
    emulator, dev = served
    scene = Scene(emulator, dev, random.Random(seed))  # noqa: S311
    said = len(dev.log)
    violations = [*play(scene), *(f"ours to mend: {line}" for line in OURS_TO_MEND.findall(dev.log[said:]))]
    again = f"run it again: PROVIDER_SCHEDULES_SEED={seed} PROVIDER_SCHEDULES_N=1"
    assert not violations, "\n".join([f"seed {seed}, {again}", *scene.story, "", *violations, "", dev.log[said:]])


def play(scene: Scene) -> list[str]:
    """One schedule: what was broken."""
    chance, emulator = scene.chance, scene.emulator
    for index in range(SESSIONS):
        calls = [[f"s{index}t{turn}c{n}" for n in range(chance.randint(1, 2))] for turn in range(TURNS)]
        scene.talks.append(Talk(Seen(emulator, emulator.create_session()), calls))
    drawn = [(chance.choice([0.0, chance.uniform(0.0, 4.0)]), name) for name in _draw(chance)]
    with ThreadPoolExecutor(1) as sweeper:
        lost = _let_time_pass(scene, sorted(drawn, reverse=True), sweeper)
    emulator.clear_faults()
    return lost or [violation for talk in scene.talks for violation in _check(scene, talk)]


def _draw(chance: random.Random) -> list[str]:
    return chance.sample(list(TROUBLES), chance.randint(2, 4))


def _let_time_pass(scene: Scene, drawn: list[tuple[float, str]], sweeper: ThreadPoolExecutor) -> list[str]:
    """Until every turn is over and every item stopped. A sweep comes each second, as the cron trigger's each minute."""
    jumps = [LAPSE_SECONDS, RECLAIM_SECONDS + HEALABLE_SECONDS]
    moved, moved_at, swept_at = -1, time.monotonic(), 0.0
    sweeping: Future[None] | None = None
    while (now := time.monotonic()) - scene.began < PATIENCE_SECONDS:
        for talk in scene.talks:
            _go_on(scene, talk)
        while drawn and drawn[-1][0] <= now - scene.began:
            _, name = drawn.pop()
            scene.tell(f"trouble: {name}")
            TROUBLES[name](scene)
        if now - swept_at > 1.0 and (sweeping is None or sweeping.done()):
            sweeping, swept_at = sweeper.submit(_sweep, scene.dev), now
        if (moves := sum(record.operation in MOVES for record in list(scene.emulator.requests))) != moved:
            moved, moved_at = moves, now
        elif now - moved_at > QUIET_SECONDS:
            jumps.append(jumps.pop(0))
            scene.tell(f"nothing moves: the clock jumps {jumps[-1]:g} s")
            scene.emulator.advance(jumps[-1])
            moved_at = now
        is_over = all(talk.is_over() and _is_idle(scene, talk) for talk in scene.talks)
        if is_over and not drawn and all(talk.seen.state == "stopped" for talk in scene.talks):
            return []
        time.sleep(0.05)
    return [
        f"lost: session {index} is {scene.emulator.session(talk.seen.session)['status']} in turn {talk.turn}, waits for"
        f" {scene.emulator.pending_calls(talk.seen.session)}, its item is {talk.seen.state}"
        for index, talk in enumerate(scene.talks)
    ]


def _is_idle(scene: Scene, talk: Talk) -> bool:
    return scene.emulator.is_in(talk.seen.session, "idle")


def _go_on(scene: Scene, talk: Talk) -> None:
    """The next turn, half of the time in its last one's exit, and half of its webhooks are lost."""
    if talk.is_over() or not (talk.turn < 0 or _is_idle(scene, talk)):
        return
    if talk.turn >= 0 and talk.seen.state != "stopped" and scene.chance.random() < 0.9:
        return
    talk.turn += 1
    emulator, session, number = scene.emulator, talk.seen.session, scene.talks.index(talk)
    steps = [tools(_appends(name)) for name in talk.calls[talk.turn]]
    first = [tools(call("write", file_path="log", content="END"))] if talk.turn == 0 else []
    emulator.set_script(session, [*first, *steps, end()])
    emulator.webhooks_paused = scene.chance.random() < 0.5
    scene.tell(f"session {number}: turn {talk.turn}")
    emulator.say(session, "go")
    emulator.webhooks_paused = False


def _appends(name: str) -> Any:
    """Run twice, it would be there twice."""
    return call("edit", file_path="log", old_string="END", new_string=f"{name} END")


def _sweep(dev: WorkersDev) -> None:
    with contextlib.suppress(httpx2.TransportError):  # it may be dead just now
        dev.request("GET", SWEEP_PATH, params={"cron": "* * * * *"})


def _check(scene: Scene, talk: Talk) -> list[str]:
    """P1 and P3."""
    emulator, session = scene.emulator, talk.seen.session
    key = {"authorization": f"Bearer {FILES_KEY}"}
    answer = scene.dev.request("GET", f"/sessions/{session}/files/workspace/log", headers=key)
    content = answer.text if answer.status_code == 200 else ""  # not even the first call was run
    executed = content.removesuffix("END").split()
    found = [
        f"twice: {name} was executed {executed.count(name)} times" for name in {*executed} if executed.count(name) > 1
    ]
    results: dict[str, list[Any]] = {}
    for event in emulator.events(session, "user.tool_result"):
        results.setdefault(event["tool_use_id"], []).append(event)
    asked = []
    for use in emulator.events(session, "agent.tool_use"):
        answers = results.get(use["id"], [])
        if len(answers) != 1:
            found.append(f"unanswered: {use['input']} has {len(answers)} answers")
        elif use["name"] == "edit":
            name = use["input"]["new_string"].split()[0]
            asked.append(name)
            is_error = bool(answers[0].get("is_error"))
            if not is_error and name not in executed:
                found.append(f"untrue: {name} has an answer and was not executed: {content!r}")
    if asked != [name for turn in talk.calls for name in turn]:
        found.append(f"the agent came to {asked}")
    return found + [f"nobody asked for {name}" for name in executed if name not in asked]
