"""A newcomer's claim met 412, and that answer was lost; the request of one of the holder's beats was lost, too. The
holder's heartbeat stood still for 90 s, longer than the newcomer looked at it: it took the lease, and both worked."""

from __future__ import annotations

from tests.faults.steps import Create, Message, Provider, Schedule, Use, Wire

SCHEDULE = Schedule(
    seed=5,
    hosts=2,
    switches=(),
    steps=(
        Create(
            at=0.5,
            session=0,
            turns=(((Use(seconds=90.0), Use(seconds=90.0), Use(seconds=90.0)), (Use(seconds=90.0),)),),
        ),
        Provider(at=0.9, call="start", kind="slow_boot", count=1, seconds=125.0),
        Message(at=1.0, session=0),
        Provider(at=31.0, call="acquire", kind="forget", count=1),
        Wire(at=130.0, operation="work.heartbeat", kind="lose_response", count=1, who="runner"),
        Wire(at=150.0, operation="work.heartbeat", kind="lose_request", count=1, who="runner"),
    ),
)
