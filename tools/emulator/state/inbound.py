"""Which events a session takes, decided for a whole request before any of it is applied. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tools.emulator.errors import Invalid
from tools.emulator.params import CustomToolResult, Inbound, ToolConfirmation, UserInterrupt, UserToolResult

from .sessions import OpenCall, Session


def check(session: Session, inbound: Sequence[Inbound]) -> None:
    """Raise Invalid for the first event the session cannot take.

    Inferred: a result for an unknown or already answered call is a 400, and so is one for a call nobody has confirmed.
    """
    if session.status == "terminated":
        raise Invalid(f"session {session.id} is terminated")
    waiting = dict(session.turn.open_calls) if session.turn else {}
    late = dict(session.left_open)
    confirmed = {id_ for id_, open_call in waiting.items() if open_call.is_confirmed}
    for event in inbound:
        match event:
            case UserInterrupt(session_thread_id=thread) if thread not in (None, session.thread_id):
                raise Invalid(f"session_thread_id: {thread} is not a thread of session {session.id}")
            case UserInterrupt():
                late.update(waiting)
                confirmed.update(waiting)  # what nobody waits for needs no verdict any more
                waiting.clear()
            case ToolConfirmation(tool_use_id=id_):
                if id_ not in waiting or id_ in confirmed:
                    raise Invalid(f"tool_use_id: {id_} does not wait for a confirmation")
                confirmed.add(id_)
                if event.result == "deny":
                    del waiting[id_]
            case UserToolResult(tool_use_id=id_):
                _check_result(waiting, late, confirmed, id_, "tool_use_id", is_custom=False)
            case CustomToolResult(custom_tool_use_id=id_):
                _check_result(waiting, late, confirmed, id_, "custom_tool_use_id", is_custom=True)


def _check_result(
    waiting: dict[str, OpenCall],
    late: dict[str, OpenCall],
    confirmed: set[str],
    id_: str,
    field: str,
    *,
    is_custom: bool,
) -> None:
    open_call = waiting.get(id_) or late.get(id_)
    if open_call is None:
        raise Invalid(f"{field}: {id_} is not an open call of this session")
    if open_call.call.is_custom != is_custom:
        raise Invalid(f"{field}: {id_} is {'not ' if is_custom else ''}a custom tool call")
    if id_ in waiting and id_ not in confirmed:
        raise Invalid(f"{field}: {id_} waits for a user.tool_confirmation")
    waiting.pop(id_, None)
    late.pop(id_, None)
