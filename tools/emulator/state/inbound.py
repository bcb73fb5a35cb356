"""Which events a session takes, decided for a whole request before any of it is applied. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Invalid
from ..params import CustomToolResult, Inbound, ToolConfirmation, UserInterrupt, UserToolResult
from ..switches import Switches
from .answers import is_ignored
from .sessions import OpenCall, Session


def check(session: Session, inbound: Sequence[Inbound], switches: Switches) -> None:
    """Raise Invalid for the first event the session cannot take.

    Inferred: a result for an unknown call is a 400, and one for a call nobody has confirmed. One for a call
    that is closed is a 400 too, unless a switch lets it pass.
    """
    if session.status == "terminated":
        raise Invalid(f"session {session.id} is terminated")
    waiting = dict(session.turn.open_calls) if session.turn else {}
    late = dict(session.left_open)
    confirmed = {id_ for id_, open_call in waiting.items() if open_call.is_confirmed}
    answered: set[str] = set()
    for event in inbound:
        match event:
            case UserInterrupt(session_thread_id=thread_id) if thread_id not in (None, session.thread_id):
                thread = session.threads.get(thread_id or "")
                if thread is None:
                    raise Invalid(f"session_thread_id: {thread_id} is not a thread of session {session.id}")
                if thread.status == "terminated":
                    raise Invalid(f"session_thread_id: {thread_id} is terminated")
                if session.turn is not None and session.turn.thread is thread:
                    _interrupt(waiting, late, confirmed, switches)
            case UserInterrupt():
                _interrupt(waiting, late, confirmed, switches)
            case ToolConfirmation(tool_use_id=id_):
                if id_ not in waiting or id_ in confirmed:
                    raise Invalid(f"tool_use_id: {id_} does not wait for a confirmation")
                confirmed.add(id_)
                if event.result == "deny":
                    del waiting[id_]
            case UserToolResult(tool_use_id=id_) | CustomToolResult(custom_tool_use_id=id_):
                if id_ in waiting or id_ in late or not is_ignored(session, id_, switches, is_answered=id_ in answered):
                    _check_result(waiting, late, confirmed, id_, is_custom=isinstance(event, CustomToolResult))
                answered.add(id_)


def _interrupt(
    waiting: dict[str, OpenCall], late: dict[str, OpenCall], confirmed: set[str], switches: Switches
) -> None:
    if switches.interrupted_call == "left_open":
        late.update(waiting)
    confirmed.update(waiting)  # what nobody waits for needs no verdict any more
    waiting.clear()


def _check_result(
    waiting: dict[str, OpenCall],
    late: dict[str, OpenCall],
    confirmed: set[str],
    id_: str,
    *,
    is_custom: bool,
) -> None:
    field = "custom_tool_use_id" if is_custom else "tool_use_id"
    open_call = waiting.get(id_) or late.get(id_)
    if open_call is None:
        raise Invalid(f"{field}: {id_} is not an open call of this session")
    if open_call.call.is_custom != is_custom:
        raise Invalid(f"{field}: {id_} is {'not ' if is_custom else ''}a custom tool call")
    if id_ in waiting and id_ not in confirmed:
        raise Invalid(f"{field}: {id_} waits for a user.tool_confirmation")
    waiting.pop(id_, None)
    late.pop(id_, None)
