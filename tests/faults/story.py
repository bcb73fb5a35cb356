"""What happened in a schedule, for people."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from tests.faults.invariants import name_of
from tests.faults.loop import EPOCH

if TYPE_CHECKING:
    from tests.faults.play import World

_SHOWN = ("user.", "agent.tool_use", "agent.custom", "session.status_")


def story(world: World) -> list[str]:
    """What happened, in order."""
    lines = list(world.bells)
    for request in world.asked:
        is_usual = request.operation == "work.heartbeat" and request.status == 200
        if request.operation in ("work.ack", "work.heartbeat", "work.stop", "events.send") and not is_usual:
            lines.append((request.at, f"{request.process.name}: {request.operation} -> {request.status}"))
    for index, session_id in world.sessions.items():
        session = world.plane.truth(session_id)
        for event in session.log if session else []:
            if event["type"].startswith(_SHOWN):
                at = datetime.fromisoformat(event["processed_at"]).timestamp() - EPOCH
                detail = event.get("input") or event.get("stop_reason") or event.get("tool_use_id") or ""
                lines.append((at, f"session {index}: {event['type']} {event['id'][-6:]} {detail}"))
    for execution in world.runners.executions:
        lines.append((execution.began, f"{execution.run.process.name} executes {execution.marker}"))
        if execution.ended is not None:
            lines.append((execution.ended, f"{execution.run.process.name} is done with {execution.marker}"))
    for box in world.cloud.everything:
        lines.append((box.created_at - EPOCH, f"{box.id} is made for {name_of(world, box.session_id)}"))
        if box.gone_at is not None:
            lines.append((box.gone_at, f"{box.id} is gone"))
        lines += [(run.exited_at, f"{run.process.name} in {box.id} exits: {run.exit}") for run in box.runs if run.exit]
    return [f"{at:9.2f}  {what}" for at, what in sorted(lines, key=lambda line: line[0])]
