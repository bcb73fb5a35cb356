"""A sandbox is suspended in a call, its lease lapses, and the provider's store is lost: the session's next runner works
in another sandbox, while the first one and its journal are still there. It is counted as what it is (`not_yet.py`),
and not as a disk that is lost."""

from __future__ import annotations

from tests.faults.steps import Create, LoseStore, Message, Schedule, Suspend, Use

SCHEDULE = Schedule(
    seed=89,
    hosts=1,
    switches=(("lease_lapse", "requeue"),),
    steps=(
        Create(at=1.0, session=0, turns=(((Use(seconds=37.4),),),)),
        Message(at=2.0, session=0),
        LoseStore(at=15.0),
        Suspend(at=20.0, session=0, seconds=700.0),
    ),
)
EXCUSED = {"twice beside a forgotten disk"}
