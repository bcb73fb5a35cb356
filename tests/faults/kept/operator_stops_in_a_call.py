"""An operator's force-stop takes the lease from a runner that finds out at its next beat. Its call was begun, a message
queued the session again, and the next runner ran the call a second time: no journal."""

from __future__ import annotations

from tests.faults.steps import Create, Message, OperatorStop, Schedule, Use

SCHEDULE = Schedule(
    seed=42,
    hosts=1,
    switches=(),
    steps=(
        Create(at=0.75, session=0, turns=(((Use(seconds=75.1),),), ((Use(seconds=4.0),),))),
        Message(at=4.11, session=0),
        Message(at=18.84, session=0),
        OperatorStop(at=22.26, session=0, force=True),
    ),
)
