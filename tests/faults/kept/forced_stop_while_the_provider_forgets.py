"""An operator stopped the item by force, the next message queued the session again, and the provider did not list its
sandbox any more: until its next heartbeat the first runner worked on beside the second."""

from __future__ import annotations

from tests.faults.steps import Create, CutStream, Message, OperatorStop, Provider, Schedule, Use

SCHEDULE = Schedule(
    seed=7004326,
    hosts=3,
    switches=(),
    steps=(
        Create(19.32, 0, (((Use("run", 10.1),),), ((Use("deny", 42.1), Use("run", 37.1)), (Use("run", 44.6),)))),
        Message(79.18, 0),
        Message(82.34, 0),
        Provider(83.06, "acquire", "forget", 1, 100.0),
        OperatorStop(83.29, 0, force=True),
        CutStream(86.59, 0),
    ),
)
EXCUSED = {"forced"}
