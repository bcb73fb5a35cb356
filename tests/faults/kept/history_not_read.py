"""The list of a session's events fails while the runner attaches. The SDK goes on with the live stream alone, so the
call made before was never seen: the runner beat for ever, and nothing heals a session whose item is active."""

from __future__ import annotations

from tests.faults.steps import Create, Message, Schedule, Use, Wire

SCHEDULE = Schedule(
    seed=8001042,
    hosts=1,
    switches=(),
    steps=(
        Create(at=61.0, session=0, turns=(((Use(kind="custom"),),), ((Use(seconds=0.6),), (Use(seconds=38.9),)))),
        Message(at=88.35, session=0),
        Message(at=116.49, session=0),
        Wire(at=118.23, operation="events.list", kind="fail", count=8, who="runner", status=503),
    ),
)
