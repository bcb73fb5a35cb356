"""A stop met 409, because an operator had stopped the item. A person's word then queued the session again, and the
SDK's second retry of that stop ended the new item, with the session's work and nobody's lease."""

from __future__ import annotations

from tests.faults.steps import Create, Message, OperatorStop, Schedule, Use

SCHEDULE = Schedule(
    seed=8000015,
    hosts=3,
    switches=(),
    steps=(
        Create(
            at=12.63,
            session=0,
            turns=(((Use(seconds=36.6),), (Use(seconds=0.6), Use(seconds=4.5)), (Use(kind="ask", seconds=105.4),)),),
        ),
        Message(at=15.89, session=0),
        OperatorStop(at=73.0, session=0, force=True),
    ),
)
