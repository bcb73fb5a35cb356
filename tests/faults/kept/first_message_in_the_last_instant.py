"""A first message came between the end of a runner's patience and its stop, and led to another client's call. The
runner left as if it had waited for that all the time; its next one had to be launched for the answer."""

from __future__ import annotations

from tests.faults.steps import Create, Message, Schedule, Use

SCHEDULE = Schedule(
    seed=46,
    hosts=4,
    switches=(("repeated_secret", "fresh_only"), ("stop_reply", 204)),
    steps=(
        Create(at=12.0, session=0, turns=(((Use(kind="custom", seconds=0.4),),),)),
        Message(at=30.35, session=0),
    ),
)
