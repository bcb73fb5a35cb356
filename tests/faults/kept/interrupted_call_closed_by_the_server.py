"""Where the server itself closes the calls of an interrupted turn, the SDK takes them for open: it ran the call again
after each reconnection, and never left."""

from __future__ import annotations

from tests.faults.steps import Create, Interrupt, Message, Schedule, Use

SCHEDULE = Schedule(
    seed=146,
    hosts=2,
    switches=(("interrupted_call", "closed"),),
    steps=(
        Create(at=11.0, session=0, turns=(((Use(seconds=0.5),),), ((Use(seconds=13.4),),))),
        Message(at=24.02, session=0),
        Message(at=45.49, session=0),
        Interrupt(at=45.69, session=0),
    ),
)
