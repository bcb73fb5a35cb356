"""Two hosts found an item that nobody stops: one completed the stop and answered, which queued the session again, and
the other, with the older list, stopped what was queued."""

from __future__ import annotations

from tests.faults.steps import Create, Message, OperatorStop, Schedule, Use, Vanish

SCHEDULE = Schedule(
    seed=7001067,
    hosts=4,
    switches=(("heartbeat_on_queued", 404), ("lease_lapse", "never")),
    steps=(
        Create(17.6, 0, (((Use(seconds=33.9),), (Use(seconds=72.9), Use(seconds=11.2))),)),
        Message(38.8, 0),
        Vanish(42.19, 0),
        OperatorStop(117.72, 0),
    ),
)
