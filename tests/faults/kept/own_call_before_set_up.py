"""A runner was held up by a skill for longer than it waits for others, and took the call of a custom tool of its own
for another client's: it left, and the call was answered in its place."""

from __future__ import annotations

from tests.faults.steps import Create, KillDispatcher, Message, Schedule, Suspend, Terminate, Use, Wire

SCHEDULE = Schedule(
    seed=7001752,
    hosts=2,
    switches=(
        ("force_stop_stamps", "different"),
        ("never_beaten", "frozen"),
        ("result_for_closed_call", 200),
        ("sessions_token_may_read_skills", False),
    ),
    steps=(
        Create(
            18.08,
            0,
            (
                ((Use("run", 3.4),), (Use("custom", 82.7),), (Use("run", 12.6),)),
                ((Use("run", 42.9),), (Use("run", 99.9),), (Use("own", 12.9),)),
            ),
            has_skill=True,
        ),
        Message(34.81, 0),
        KillDispatcher(41.13, 1, 55, 30.0),
        Message(78.28, 0),
        Wire(78.58, "sessions.get", "reset_response"),
        Wire(105.51, "skills.content", "fail", 8, "runner", 0.0, 529),
        Suspend(125.49, 0, 200.0),
        Terminate(147.8, 0, keeps_files=False),
        Wire(181.93, "skills.version", "lose_request", 3, "runner"),
    ),
)
