"""The SDK's runner holds its idle clock for a verdict that never comes once the turn is interrupted: it stayed, and its
sandbox with it, for ever. It is patient for SANDBOX_MAX_WAIT_SECONDS now."""

from __future__ import annotations

from tests.faults.steps import Create, Interrupt, Message, Schedule, Use

SCHEDULE = Schedule(
    seed=268,
    hosts=1,
    switches=(),
    steps=(
        Create(at=0.1, session=0, turns=(((Use(kind="ask", seconds=10.0),),),)),
        Message(at=26.9, session=0),
        Interrupt(at=36.95, session=0),
    ),
)
