"""Seeded fault schedules for any provider, in real time: the real dispatcher, that provider, the real runner.

A subclass says how its provider is made and what can go wrong with it. For each seed two to four of those troubles meet
a few sessions of two turns each, on the emulator's clock, which jumps whenever nothing moves. Then it must be true that

- every turn is over, and every call was answered once: with what it printed, or with an error;
- no call was executed twice, and never two runners of a session at once (each call reports to the emulator, before and
  after, from inside the sandbox);
- nothing is left once every session's files may go: not at the provider, not as a process;
- no task has ended with an error that nobody expected.

What it cannot show: "killed" is a host whose tasks are all cancelled at once, so its `finally` clauses still run.
`tests/faults` kills between any two steps, in virtual time and without a real provider.

A seed that fails says how it is run again. The times are real, so what it does is not the same to the millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, RECLAIM_SECONDS, Core, Host, World
from tools.emulator import Emulator, Execution

SCHEDULE_SECONDS = 150.0  # real ones; a schedule that takes longer has lost something
QUIET_SECONDS = 2.0  # real ones without anything happening, and the emulator's clock jumps
SWEEP_SECONDS = 0.5  # real ones between two sweeps: the minute of a real host
CLEAN_SECONDS = 60.0
RECLAIM_AND_HEAL_SECONDS = max(RECLAIM_SECONDS, HEALABLE_SECONDS)
SESSIONS, TURNS = 2, 2
# For a launch, a call of the provider and the pauses between attempts: as a host has them, but shorter.
TIMING = {"launch_seconds": 30.0, "call_seconds": 10.0, "retry_pauses": (0.1, 0.3, 0.6)}
SETTINGS = {"SANDBOX_MAX_IDLE_SECONDS": "0.5", "SANDBOX_KEEP_WARM_SECONDS": "1"}
_MOVES = frozenset({"work.ack", "work.heartbeat", "work.stop", "events.send"})
_OURS = ("shared", "_shared", "sandbox", "main")

# Bash alone, for sandboxes without curl: says to the emulator which call begins or ends in which runner.
_REPORT = """r() {{ s=$(cat /proc/$PPID/stat 2>/dev/null); set -- "$1" ${{s##*) }};
 b='{{"call":"{call} '$1'","runner":"'$PPID-${{21:-}}'","session_id":"{session}"}}'; exec 9<>/dev/tcp/{host}/{port};
 printf '%s\\r\\n' 'POST /_emulator/executions HTTP/1.1' 'Host: {host}:{port}' 'Connection: close'
 'Content-Type: application/json' "Content-Length: ${{#b}}" '' >&9; printf %s "$b" >&9; cat <&9 >/dev/null; exec 9>&-;
 }}; r begin; {command}; r end; echo {call}""".replace("\n", "")


@dataclass(frozen=True)
class Trouble:
    """One thing that can go wrong. `apply` arms it, or waits for its moment and does it; it must not raise."""

    name: str
    apply: Callable[[Scene], Awaitable[None]]


@dataclass
class Scene:
    """One schedule under way: what a trouble can reach."""

    world: World
    seed: int
    settings: dict[str, str]
    shares_provider: bool
    sessions: list[str] = field(default_factory=list)
    hosts: dict[Host, asyncio.Task[None]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    """What the next calls do instead of taking a moment."""
    story: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    met: set[str] = field(default_factory=set)
    """The calls in which some trouble came."""
    began: float = field(default_factory=time.monotonic)

    @property
    def emulator(self) -> Emulator:
        return self.world.emulator

    @property
    def host(self) -> Host:
        """The host that was started last."""
        return list(self.hosts)[-1]

    def chance(self, who: str) -> random.Random:
        """Chance of its own for everybody, so that it does not depend on who is faster."""
        return random.Random(f"{self.seed} {who}")  # noqa: S311 - nothing is guarded by it

    def tell(self, text: str) -> None:
        self.story.append(f"{time.monotonic() - self.began:6.2f}  {text}")

    def start_host(self, **settings: str) -> Host:
        """One more host, with a provider of its own where the provider has nothing in its process."""
        provider = self.host.provider if self.hosts and self.shares_provider else None
        chosen: dict[str, Any] = self.settings | settings
        host = self.world.host(provider=provider, timing=TIMING, **chosen)
        self.hosts[host] = asyncio.create_task(self._serve(host))
        return host

    async def kill_host(self) -> None:
        """Ends the last host in the middle of whatever it does, and starts another one."""
        await self._end(self.host)
        self.start_host()

    async def end_hosts(self) -> None:
        for host in list(self.hosts):
            await self._end(host)

    async def until_in_a_call(self) -> str | None:
        """The session of a call that is being executed, another one for each that asks; None when the schedule is over
        before there is one."""
        while not self.is_over():
            for execution in list(self.emulator.executions):
                call, _, what = execution.call.partition(" ")
                ended = any(later.call == f"{call} end" for later in list(self.emulator.executions))
                if what == "begin" and not ended and call not in self.met:
                    self.met.add(call)
                    return execution.session_id
            await asyncio.sleep(0.02)
        return None

    def is_over(self) -> bool:
        """Whether every turn of every session is."""
        return len(self.sessions) == SESSIONS and all(
            len(self.emulator.events(session, "user.message")) == TURNS and self.emulator.is_in(session, "idle")
            for session in self.sessions
        )

    async def _serve(self, host: Host) -> None:
        while True:
            await host.dispatcher.sweep()
            await asyncio.sleep(SWEEP_SECONDS)

    async def _end(self, host: Host) -> None:
        serving = self.hosts[host]
        serving.cancel()
        (outcome,) = await asyncio.gather(serving, return_exceptions=True)
        if not isinstance(outcome, asyncio.CancelledError):
            self.bugs.append(f"a sweep ended with {outcome!r}")
        await host.dispatcher.close(0)


async def _host_killed(scene: Scene) -> None:
    await scene.kill_host()


async def _host_killed_in_a_call(scene: Scene) -> None:
    await scene.until_in_a_call()
    await scene.kill_host()


async def _second_host(scene: Scene) -> None:
    scene.start_host()


async def _runner_killed(scene: Scene) -> None:
    scene.commands.append("kill -9 $PPID; sleep 20")


async def _runner_told_to_leave(scene: Scene) -> None:
    scene.commands.append("kill -TERM $PPID; sleep 20")


async def _polls_fail(scene: Scene) -> None:
    scene.emulator.fault("work.poll", "fail", scene.chance("polls").randint(1, 4), status=503)


async def _answers_lost(scene: Scene) -> None:
    chance = scene.chance("answers")
    operation = chance.choice(["work.poll", "work.ack", "events.send", "work.stop"])
    scene.emulator.fault(operation, "lose_response", after=chance.randint(0, 1))


COMMON = [
    Trouble("the host is killed, another one starts", _host_killed),
    Trouble("the host is killed while a call runs, another one starts", _host_killed_in_a_call),
    Trouble("a second host serves too", _second_host),
    Trouble("a runner is killed in a call", _runner_killed),
    Trouble("a runner is told to leave in a call", _runner_told_to_leave),
    Trouble("polls fail", _polls_fail),
    Trouble("an answer of the control plane is lost", _answers_lost),
]


class ProviderSchedules:
    """Subclass as `class Test<Name>Schedules(ProviderSchedules)` in tests/providers/test_<name>_schedules.py."""

    core: ClassVar[Core]
    seeds: ClassVar[int] = 3
    """How many are played by default; PROVIDER_SCHEDULES_N plays more, PROVIDER_SCHEDULES_SEED begins elsewhere."""
    patience: ClassVar[float] = SCHEDULE_SECONDS
    launches_take_seconds: ClassVar[bool] = False
    """Whether a launch that is under way counts as something that moves."""
    shares_provider: ClassVar[bool] = False
    """Whether a second host can only share the first one's provider object."""
    own_troubles: ClassVar[int] = 1
    """At least so many of a schedule's troubles are the provider's own, if it has any."""
    emulator_host: ClassVar[str] = "127.0.0.1"
    """As in the contract suite."""

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        """As in the contract suite."""
        raise NotImplementedError

    def troubles(self) -> list[Trouble]:
        """What can go wrong with this provider, beside what can go wrong with all of them."""
        return []

    async def calm(self, scene: Scene) -> None:
        """Takes back whatever is armed and was not met. Called before the final clean-up."""

    async def leftovers(self, scene: Scene) -> list[str]:
        """What the vendor, or the machine, still has of this environment: sandboxes, processes. Asked when the provider
        lists nothing any more."""
        return []

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "seed" in metafunc.fixturenames:
            first = int(os.environ.get("PROVIDER_SCHEDULES_SEED", "0"))
            metafunc.parametrize("seed", range(first, first + int(os.environ.get("PROVIDER_SCHEDULES_N", self.seeds))))

    async def test_schedule(self, seed: int, tmp_path: Path) -> None:
        with Emulator(host=self.emulator_host) as emulator:
            violations, story = await self.play(seed, emulator, tmp_path / "sandboxes")
        again = f"run it again: PROVIDER_SCHEDULES_SEED={seed} PROVIDER_SCHEDULES_N=1"
        assert not violations, "\n".join([f"seed {seed}, {again}", *story, "", *violations])

    async def play(self, seed: int, emulator: Emulator, root: Path) -> tuple[list[str], list[str]]:
        """One schedule: what was broken, and what happened."""
        world = World(emulator, self.core, self.make_provider, root)
        scene = Scene(world, seed, SETTINGS, self.shares_provider)
        async with _listening_for_bugs(scene):
            drawn = self._draw(scene.chance("troubles"))
            scene.start_host()
            scene.sessions += [emulator.create_session() for _ in range(SESSIONS)]
            working = [asyncio.create_task(self._bring(scene, trouble)) for trouble in drawn]
            working += [asyncio.create_task(self._converse(scene, session)) for session in scene.sessions]
            lost = await self._let_time_pass(scene, working)
            for task in working:
                task.cancel()
            scene.bugs += [
                repr(outcome)
                for outcome in await asyncio.gather(*working, return_exceptions=True)
                if isinstance(outcome, Exception) and not (lost and isinstance(outcome, TimeoutError))
            ]
            await self.calm(scene)
            emulator.clear_faults()
            left = [] if lost else await self._clean_up(scene)
            await world.close()
            left += [] if lost else await self.leftovers(scene)
        unanswered = [] if lost else answers(scene)
        violations = [*lost, *executions(scene), *unanswered, *(f"left: {it}" for it in left)]
        return violations + [f"bug: {text}" for text in dict.fromkeys(scene.bugs)], scene.story

    def _draw(self, chance: random.Random) -> list[Trouble]:
        own = self.troubles()
        count = chance.randint(2, 4)
        first = chance.sample(own, min(self.own_troubles, len(own), count))
        others = [trouble for trouble in (*own, *COMMON) if trouble not in first]
        return first + chance.sample(others, min(count - len(first), len(others)))

    async def _bring(self, scene: Scene, trouble: Trouble) -> None:
        # Half of them are there before anything happens; the others come at any moment of the turns.
        chance = scene.chance(trouble.name)
        await asyncio.sleep(chance.choice([0.0, chance.uniform(0.0, 4.0)]))
        scene.tell(f"trouble: {trouble.name}")
        await trouble.apply(scene)

    async def _converse(self, scene: Scene, session: str) -> None:
        emulator, index = scene.emulator, scene.sessions.index(session)
        chance = scene.chance(f"session {index}")
        await asyncio.sleep(chance.uniform(0.0, 0.3))
        for turn in range(TURNS):
            calls = [f"s{index}t{turn}c{number}" for number in range(chance.randint(1, 2))]
            seconds = chance.choice([0.0, 0.3])
            emulator.say(session, "\n".join(f"!{self._command(scene, session, call, seconds)}" for call in calls))
            scene.tell(f"session {index}: turn {turn}")
            if chance.random() < 0.5:  # the other half of the webhooks is lost
                scene.host.dispatcher.wake()
            await asyncio.to_thread(emulator.wait_idle, session, self.patience)
            scene.tell(f"session {index}: turn {turn} is over")
            if chance.random() < 0.5:  # the other half meets the runner, or its exit
                await asyncio.to_thread(emulator.wait_for, session, "stopped", self.patience)

    def _command(self, scene: Scene, session: str, call: str, seconds: float) -> str:
        api = urlsplit(scene.world.base_url)
        command = scene.commands.pop() if scene.commands else f"sleep {seconds:g}"
        return _REPORT.format(call=call, session=session, host=api.hostname, port=api.port, command=command)

    async def _let_time_pass(self, scene: Scene, working: list[asyncio.Task[None]]) -> list[str]:
        """Jumps the clock whenever nothing moves, until every turn is over."""
        clock = _Clock(scene, self.launches_take_seconds)
        while time.monotonic() - scene.began < self.patience:
            if all(task.done() for task in working):
                return []
            clock.jump_if_quiet()
            await asyncio.sleep(0.05)
        return [
            f"lost: session {index} is {scene.emulator.session(session)['status']}, waits for"
            f" {scene.emulator.pending_calls(session)}, its item is {scene.emulator.work(session)['state']}"
            for index, session in enumerate(scene.sessions)
            if not scene.emulator.is_in(session, "idle")
        ] or ["endless: every turn is over, and something of the schedule is not"]

    async def _clean_up(self, scene: Scene) -> list[str]:
        """Every session's files may go now. What does not go?"""
        await scene.end_hosts()
        scene.emulator.advance(LAPSE_SECONDS)  # whoever died without a stop has lost its lease
        host = scene.start_host(SANDBOX_RETENTION_SECONDS="0", SANDBOX_KEEP_WARM_SECONDS="0")
        clock = _Clock(scene, self.launches_take_seconds)  # the last poll of a host that was ended may still reserve
        deadline = time.monotonic() + CLEAN_SECONDS
        while time.monotonic() < deadline and not scene.hosts[host].done():
            left = [info async for info in host.provider.sandboxes()]
            if not left:
                break
            clock.jump_if_quiet()
            await asyncio.sleep(0.1)
        await scene.end_hosts()
        return [f"{info.sandbox_id} of {info.session_id} is never released" for info in left]


class _Clock:
    """Jumps whenever nothing moves."""

    def __init__(self, scene: Scene, launches_move: bool) -> None:
        self._scene, self._launches_move = scene, launches_move
        self._jumps = cycle([LAPSE_SECONDS, RECLAIM_AND_HEAL_SECONDS])
        self._moved, self._moved_at = -1, time.monotonic()

    def jump_if_quiet(self) -> None:
        scene = self._scene
        launches = self._launches_move and any(host.dispatcher._launches for host in scene.hosts)
        if (moves := _moves(scene.emulator)) != self._moved or launches:
            self._moved, self._moved_at = moves, time.monotonic()
        elif time.monotonic() - self._moved_at > QUIET_SECONDS:
            jump = next(self._jumps)
            scene.tell(f"nothing moves: the clock jumps {jump:g} s")
            scene.emulator.advance(jump)
            self._moved_at = time.monotonic()


def _moves(emulator: Emulator) -> int:
    return len(emulator.executions) + sum(record.operation in _MOVES for record in list(emulator.requests))


def executions(scene: Scene) -> list[str]:
    """P3: no call is executed twice, and never two runners at once."""
    found: list[str] = []
    reports = list(scene.emulator.executions)
    begins = Counter(report.call for report in reports if report.call.endswith(" begin"))
    found += [f"twice: {call.split()[0]} was executed {count} times" for call, count in begins.items() if count > 1]
    open_calls: dict[str | None, Execution] = {}  # by session
    for report in reports:
        call, _, what = report.call.partition(" ")
        before = open_calls.get(report.session_id)
        if what == "begin":
            if before and before.runner != report.runner and _ends_after(report, before, reports):
                found.append(f"overlap: {call} began in another runner before {before.call.split()[0]} ended")
            open_calls[report.session_id] = report
        elif before and before.call == f"{call} begin":
            del open_calls[report.session_id]
    return found


def _ends_after(report: Execution, before: Execution, reports: list[Execution]) -> bool:
    end = f"{before.call.partition(' ')[0]} end"
    return any(later.call == end for later in reports[reports.index(report) :])


def answers(scene: Scene) -> list[str]:
    """P1: each call has one answer; it is what the call printed, or an error."""
    found: list[str] = []
    executed = {report.call for report in scene.emulator.executions}
    for session in scene.sessions:
        results: dict[str, list[Any]] = {}
        for event in scene.emulator.events(session, "user.tool_result"):
            results.setdefault(event["tool_use_id"], []).append(event)
        for use in scene.emulator.events(session, "agent.tool_use"):
            call = str(use["input"]["command"]).rpartition(" ")[2]
            answers = results.get(use["id"], [])
            if len(answers) != 1:
                found.append(f"unanswered: {call} has {len(answers)} answers")
            elif not answers[0].get("is_error") and (
                f"{call} end" not in executed or call not in str(answers[0]["content"])
            ):
                found.append(f"untrue: {call} has an answer, and did not run to its end: {answers[0]['content']}")
    return found


@asynccontextmanager
async def _listening_for_bugs(scene: Scene) -> AsyncIterator[None]:
    """The core logs an error that it did not expect with its traceback, and goes on."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith(_OURS):
                scene.tell(f"{record.levelname.lower()}: {record.getMessage()}")
                if record.exc_info:
                    scene.bugs.append(logging.Formatter().formatException(record.exc_info))

    listener, root = Listener(), logging.getLogger()
    root.addHandler(listener)
    try:
        yield
    finally:
        root.removeHandler(listener)
