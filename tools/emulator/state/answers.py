"""Open facts about answers and messages that come too late, as their switches decide them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Invalid
from ..params import Inbound, UserInterrupt, UserMessage
from ..switches import Switches
from .sessions import Session
from .work import WorkItem

_CALLS = ("agent.tool_use", "agent.custom_tool_use")
_ANSWERS = {"user.tool_result": "tool_use_id", "user.custom_tool_result": "custom_tool_use_id"}


def is_ignored(session: Session, call_id: str, switches: Switches, *, is_answered: bool) -> bool:
    """Whether a result for this call, which is not open, is accepted without effect."""
    if is_answered or any(event.get(_ANSWERS.get(event["type"], "")) == call_id for event in session.log):
        return switches.duplicate_tool_result == 200
    if any(event["type"] in _CALLS and event["id"] == call_id for event in session.log):
        return switches.result_for_closed_call == 200
    return False


def refuse_when_stranded(
    session: Session, item: WorkItem | None, inbound: Sequence[Inbound], switches: Switches
) -> None:
    """Reported in production: a message to a session that waits for a call nobody will run is refused.

    An interrupt before the message ends the wait, and so the refusal.
    """
    if switches.message_to_stranded_session == "queues" or not session.pending_ids():
        return
    if item is not None and item.is_live:
        return
    first = next((each for each in inbound if isinstance(each, UserMessage | UserInterrupt)), None)
    if isinstance(first, UserMessage):
        raise Invalid(f"session {session.id} waits for {', '.join(session.pending_ids())}: interrupt it first")
