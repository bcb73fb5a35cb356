"""A seed becomes a schedule: a few sessions with messages, a few kinds of trouble at moments that matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

from tests.faults import steps
from tests.faults.steps import Schedule, Step, Turn, Use
from tests.faults.wire import Kind

BUSY_SECONDS = 240.0  # the time in which things happen; what follows is recovery
SWITCHES: dict[str, tuple[str | int | bool, ...]] = {
    "repeated_secret": ("fresh_only", "same"),
    "secret": ("extra_keys", "extra_keys", "null", "undecodable"),
    "work_id": ("work_",),
    "ack_on_claimed": (409,),
    "ack_on_stopped": (409,),
    "heartbeat_on_queued": (404, 409),
    "never_beaten": ("frozen",),
    "lease_lapse": ("requeue", "never"),
    "created_at_after_requeue": ("new",),
    "stop_reply": (204,),
    "force_stop_stamps": ("different",),
    "token_after_stop": ("401",),
    "result_on_stopped_item": ("ignored",),
    "message_to_stranded_session": ("400",),
    "interrupted_call": ("closed",),
    "result_for_closed_call": (200,),
    "duplicate_tool_result": (200,),
    "unprocessed_input_at_stop": ("strand",),
    "environment_key_may_answer": (False,),
    "sessions_token_may_read_skills": (False,),
    "credentials": ("lenient",),
}
"""Every switch, with what is not its default. Of servers on which nothing can work, `invariants.HOPELESS` asks the
rest."""
_ASKED_BY_RUNNERS = (
    *("work.ack", "work.heartbeat", "work.heartbeat", "work.stop"),
    *("events.send", "sessions.get", "events.list"),
)
_ASKED_BY_HOSTS = (
    *("work.poll", "work.list", "work.heartbeat", "work.stop"),
    *("events.send", "sessions.get", "events.list"),
)
_ANSWER_TROUBLES: tuple[Kind, ...] = ("lose_response", "reset_response", "duplicate")
_LOSSES: tuple[Kind, ...] = ("lose_request", "lose_response", "reset_request", "reset_response")


class _Maker:
    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)  # noqa: S311 - a test's luck
        self.more_luck = random.Random(f"{seed} twice")  # noqa: S311 - of what came later, so that it changes no other's
        self.sessions = self.luck.choice((1, 1, 2, 3))
        self.has_skills = False
        self.moments: list[float] = []
        """When messages are sent: what follows is a launch, a claim, a call."""

    def at(self) -> float:
        if self.luck.random() < 0.6:
            return round(self.luck.choice(self.moments) + self.luck.choice((0.5, 5.0, 25.0)) * self.luck.random(), 2)
        return round(self.luck.uniform(0.0, BUSY_SECONDS), 2)

    def session(self) -> int:
        return self.luck.randrange(self.sessions)

    def use(self) -> Use:
        kind = self.luck.choices(("run", "ask", "deny", "own", "custom"), (8, 1, 0.5, 0.7, 0.7))[0]
        return Use(kind, round(self.luck.choice((0.5, 4.0, 12.0, 40.0, 90.0)) * self.luck.uniform(0.8, 1.2), 1))  # type: ignore[arg-type]

    def turn(self) -> Turn:
        return tuple(
            tuple(self.use() for _ in range(self.luck.choices((1, 2), (4, 1))[0]))
            for _ in range(self.luck.choice((1, 1, 2, 3)))
        )

    def life(self, index: int) -> list[Step]:
        """One session: it is created, and messages follow, often just when the runner before is about to leave."""
        at = round(self.luck.uniform(0.0, 30.0), 2)
        count = self.luck.choice((1, 1, 2, 3))
        turns, has_skill = tuple(self.turn() for _ in range(count)), self.luck.random() < 0.2
        self.has_skills |= has_skill
        found: list[Step] = [steps.Create(at, index, turns, has_skill)]
        for _ in range(count):
            at = round(at + self.luck.choice((0.1, 3.0, 17.0, 25.0, 60.0)) * self.luck.uniform(0.7, 1.3), 2)
            found.append(steps.Message(at, index))
            self.moments.append(at)
        return found

    # Trouble

    def webhooks(self) -> Step:
        kind = self.luck.choice(("lose", "delay", "duplicate", "reorder"))
        return steps.Webhooks(self.at(), kind, self.luck.randint(1, 4), round(self.luck.uniform(1, 90), 1))  # type: ignore[arg-type]

    def kill_dispatcher(self) -> Step:
        return steps.KillDispatcher(
            self.at(), self.luck.randrange(4), self.luck.randint(0, 150), self.luck.choice((1.0, 30.0, 150.0))
        )

    def kill_runner(self) -> Step:
        return steps.KillRunner(self.at(), self.session(), self.luck.randint(0, 400))

    def terminate(self) -> Step:
        count = self.luck.choice((None, self.luck.randint(0, 400)))
        return steps.Terminate(self.at(), self.session(), self.luck.random() < 0.5, count)

    def vanish(self) -> Step:
        return steps.Vanish(self.at(), self.session())

    def suspend(self) -> Step:
        return steps.Suspend(self.at(), self.session(), self.luck.choice((20.0, 200.0, 280.0, 320.0, 400.0, 700.0)))

    def provider(self) -> Step:
        call = self.luck.choice(("acquire", "acquire", "start", "start", "list", "release"))
        kinds = {
            "start": ("slow", "slow_boot", "fail", "fail_for_good", "half_done", "lie"),
            "acquire": ("slow", "fail", "half_done", "forget"),
        }.get(call, ("slow", "fail"))
        seconds = self.luck.choice((5.0, 40.0, 100.0, 130.0))
        at, kind, count = self.at(), self.luck.choice(kinds), self.luck.randint(1, 3)
        if (call, kind) == ("acquire", "slow"):
            seconds += 60.0  # some longer than an item is handed out for: two hosts make a sandbox at once
        return steps.Provider(at, call, kind, count, seconds)  # type: ignore[arg-type]

    def two_sandboxes(self) -> list[Step]:
        """A runner boots for so long that its item is handed out again, with a second token; and the second launch does
        not find the first one's sandbox."""
        at = self.luck.choice(self.moments)
        boot = round(self.luck.uniform(90.0, 135.0), 1)
        return [
            steps.Provider(max(0.0, at - 1.0), "start", "slow_boot", 1, boot),
            steps.Provider(at + 30.0, "acquire", "forget", 1),
        ]

    def store(self) -> Step:
        return steps.LoseStore(self.at(), self.luck.random() < 0.5)

    def save_store(self) -> Step:
        return steps.SaveStore(self.at())

    def wire(self) -> Step:
        """A loss, a delay or a burst of refusals, mostly of what the lease and the answers depend on."""
        who: str = self.luck.choice(("runner", "runner", "dispatcher", "anybody"))
        operation = self.luck.choice(
            _ASKED_BY_HOSTS
            if who != "runner"
            else (*_ASKED_BY_RUNNERS, *(("skills.version", "skills.content") if self.has_skills else ()))
        )
        how = self.luck.random()
        if how < 0.5:
            at, loss, count = self.at(), self.luck.choice(_LOSSES), self.luck.randint(1, 3)
            loss = "duplicate" if self.more_luck.random() < 0.2 else loss
            return steps.Wire(at, operation, loss, count, who)  # type: ignore[arg-type]
        if how < 0.75:
            kind: Kind = self.luck.choice(("delay", "delay_request"))
            seconds = self.luck.choice((3.0, 12.0, 35.0, 70.0))
            return steps.Wire(self.at(), operation, kind, self.luck.randint(1, 2), who, seconds)  # type: ignore[arg-type]
        status = self.luck.choice((500, 503, 529, 429, 408))
        return steps.Wire(self.at(), operation, "fail", self.luck.choice((1, 3, 3, 8)), who, 0.0, status)  # type: ignore[arg-type]

    def stream(self) -> Step:
        if self.luck.random() < 0.5:
            return steps.Wire(self.at(), "events.stream", self.luck.choice(("reset_response", "fail")), 2, "runner")
        return steps.CutStream(self.at(), self.session())

    def interrupt(self) -> Step:
        return steps.Interrupt(self.at(), self.session())

    def archive(self) -> Step:
        return steps.Archive(self.at(), self.session())

    def delete(self) -> Step:
        return steps.Delete(self.at(), self.session())

    def operator_stop(self) -> Step:
        return steps.OperatorStop(self.at(), self.session(), self.luck.random() < 0.5)

    def skew(self) -> Step:
        return steps.Skew(self.at(), self.luck.choice((-90.0, -7.0, 45.0, 400.0)))

    def rotate_key(self) -> Step:
        return steps.RotateKey(self.at(), self.luck.choice((1.0, 40.0)))


TROUBLES: dict[str, tuple[float, Callable[[_Maker], Step | list[Step]]]] = {
    "webhooks": (3, _Maker.webhooks),
    "kill_dispatcher": (3, _Maker.kill_dispatcher),
    "kill_runner": (3, _Maker.kill_runner),
    "terminate": (2, _Maker.terminate),
    "vanish": (2, _Maker.vanish),
    "suspend": (2, _Maker.suspend),
    "provider": (4, _Maker.provider),
    "two_sandboxes": (1, _Maker.two_sandboxes),
    "store": (1, _Maker.store),
    "save_store": (1, _Maker.save_store),
    "wire": (8, _Maker.wire),
    "stream": (2, _Maker.stream),
    "interrupt": (1, _Maker.interrupt),
    "archive": (0.5, _Maker.archive),
    "delete": (0.5, _Maker.delete),
    "operator_stop": (1, _Maker.operator_stop),
    "skew": (0.7, _Maker.skew),
    "rotate_key": (0.5, _Maker.rotate_key),
}
"""Every kind of trouble with its weight."""


def generate(seed: int) -> Schedule:
    maker = _Maker(seed)
    made: list[Step] = []
    for index in range(maker.sessions):
        made += maker.life(index)
    weights = [weight for weight, _ in TROUBLES.values()]
    for kind in maker.luck.choices(list(TROUBLES), weights, k=maker.luck.choice((1, 2, 2, 3, 3, 4, 6))):
        trouble = TROUBLES[kind][1](maker)
        made += trouble if isinstance(trouble, list) else [trouble]
    names = maker.luck.sample(sorted(SWITCHES), maker.luck.choice((0, 0, 1, 2, 4)))
    switches = tuple((name, maker.luck.choice(SWITCHES[name])) for name in sorted(names))
    return Schedule(seed, maker.luck.choice((2, 2, 3, 4)), switches, tuple(sorted(made, key=lambda step: step.at)))


ORDINARY = Schedule(
    seed=1,
    steps=(
        steps.Create(0.5, 0, (((Use(seconds=4.0),), (Use(seconds=1.0), Use("ask", 1.0))), ((Use("own", 2.0),),))),
        steps.Message(1.0, 0),
        steps.Message(30.0, 0),
    ),
)
IN_A_CALL = 15.0  # when this one's agent has begun to wait for its long call
LONG_CALL = Schedule(
    seed=2,
    steps=(
        steps.Create(
            0.5, 0, (((Use(seconds=30.0), Use(seconds=2.0)), (Use("own", 2.0),)), ((Use("ask", 2.0),),)), has_skill=True
        ),
        steps.Message(1.0, 0),
        steps.Message(2.0, 0),
    ),
)


HEALED = Schedule(
    seed=3,
    hosts=1,
    steps=(
        steps.Create(0.5, 0, (((Use(seconds=30.0),), (Use(seconds=1.0),)),)),
        steps.Message(1.0, 0),
        steps.KillRunner(15.0, 0),
        steps.Provider(100.0, "acquire", "forget"),
        steps.Provider(100.0, "start", "fail"),
    ),
)
"""A strand that is healed at 442 s; the launch that follows fails once, in another sandbox, and the first sandbox is
released at 635 s."""
FREED = replace(HEALED, switches=(("lease_lapse", "never"),))  # at 631 s: the lease does not lapse by itself
TAKEN_OVER = Schedule(
    seed=4,
    hosts=1,
    steps=(
        steps.Create(38.0, 0, (((Use(seconds=75.0),),), ((Use(seconds=4.0),),))),
        steps.Message(38.5, 0),
        steps.Message(50.0, 0),
        steps.OperatorStop(60.0, 0, force=True),
    ),
)
"""The item of a working runner is queued again, and a newcomer in its sandbox takes over from it at 65 s."""


@dataclass(frozen=True)
class Kills:
    """A kill at each of so many awaits. One more would change nothing that happens before `until`, seconds."""

    of: Schedule
    at: Callable[[int], Step]
    count: int
    until: float = inf

    def schedule(self, number: int) -> Schedule:
        return self.of.with_steps((*self.of.steps, self.at(number)))


EVERY_KILL = (
    Kills(ORDINARY, lambda count: steps.KillRunner(0.6, 0, count), 480),
    Kills(ORDINARY, lambda count: steps.Terminate(0.6, 0, steps=count), 480),
    Kills(ORDINARY, lambda count: steps.KillDispatcher(0.6, 0, count, 30.0), 100),
    Kills(HEALED, lambda count: steps.KillDispatcher(441.0, 0, count, 30.0), 80, until=600.0),
    Kills(HEALED, lambda count: steps.KillRunner(441.0, 0, count), 240),
    Kills(HEALED, lambda count: steps.KillDispatcher(628.0, 0, count, 30.0), 40),
    Kills(FREED, lambda count: steps.KillDispatcher(629.0, 0, count, 30.0), 80, until=670.0),
    Kills(TAKEN_OVER, lambda count: steps.KillRunner(61.0, 0, count), 240),
    Kills(TAKEN_OVER, lambda count: steps.Terminate(61.0, 0, steps=count), 240),
)


def every_kill() -> Iterator[Schedule]:
    """An ordinary session, one that is healed, freed, or taken over: its runner, or its dispatcher, is killed at every
    await there is; or its sandbox is told there that it ends."""
    for kills in EVERY_KILL:
        yield from map(kills.schedule, range(kills.count))


def every_server() -> Iterator[Schedule]:
    """What may befall a sandbox in the middle of a call, each on every kind of server that a switch makes."""
    at = IN_A_CALL
    troubles: list[tuple[Step, ...]] = [
        (),
        (steps.KillRunner(at, 0),),
        (steps.Vanish(at, 0),),
        (steps.Terminate(at, 0),),
        (steps.Terminate(at, 0, keeps_files=False),),
        *((steps.Suspend(at, 0, seconds),) for seconds in (200.0, 400.0)),
        *((steps.OperatorStop(at, 0, force),) for force in (False, True)),
        (steps.Interrupt(at, 0), steps.Message(at + 5.0, 0)),
        (steps.KillRunner(at, 0), steps.Interrupt(at + 5.0, 0)),
        (steps.RotateKey(at), steps.KillRunner(at, 0)),
        *((steps.Wire(at, "work.heartbeat", kind, 1, "runner"),) for kind in _ANSWER_TROUBLES),
        *((steps.Wire(at, "events.send", kind, 1, "runner"),) for kind in _ANSWER_TROUBLES),
        *((steps.Wire(at, "work.stop", kind, 1, "runner"),) for kind in _ANSWER_TROUBLES),
    ]
    servers = [((name, value),) for name, values in SWITCHES.items() for value in dict.fromkeys(values)]
    for trouble in troubles:
        for switches in ((), *servers):
            yield replace(LONG_CALL, switches=switches, steps=(*LONG_CALL.steps, *trouble))
