"""The runner is killed in a call, a person interrupts before healing has answered, and the next message queues the
session: the next runner ran the call again, of a turn that was over."""

from __future__ import annotations

from tests.faults.steps import Create, Interrupt, KillRunner, Message, Schedule, Use

SCHEDULE = Schedule(
    seed=283,
    hosts=1,
    switches=(),
    steps=(
        Create(at=1.0, session=0, turns=(((Use(seconds=35.6), Use(seconds=79.0)),), ((Use(seconds=4.0),),))),
        Message(at=4.19, session=0),
        Message(at=6.66, session=0),
        KillRunner(at=45.71, session=0, steps=188),
        Interrupt(at=78.15, session=0),
    ),
)
