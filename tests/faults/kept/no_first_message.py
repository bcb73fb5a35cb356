"""A session that gets no message arms no idle clock: its runner stayed for ever."""

from __future__ import annotations

from tests.faults.steps import Create, Schedule

SCHEDULE = Schedule(
    seed=1,
    hosts=1,
    switches=(),
    steps=(Create(at=0.1, session=0),),
)
