"""When a session got where: rounds of steps with their milliseconds, for the page.

A round begins when the session's work item is queued and ends where the next begins. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .clock import stamp
from .state import Event, Session, WorkItem
from .state.work import Milestone
from .webhooks import Delivery

Json = dict[str, Any]
_CALLS = ("agent.tool_use", "agent.custom_tool_use")
_RESULTS = ("user.tool_result", "user.custom_tool_result")
_ORDER = ("created", "queued", "webhook", "reserved", "acked", "claimed", "first tool", "first result")


@dataclass(frozen=True)
class Step:
    name: str
    at: datetime
    note: str = ""
    is_bad: bool = False


def rounds(session: Session, item: WorkItem | None, deliveries: Iterable[Delivery]) -> list[Json]:
    """Each with `began_at` and `steps`: name, at, ms since the round began, a note, and whether it is bad news."""
    if item is None:
        return []
    split = list(_split(item.milestones))
    begins = [milestones[0].at for milestones in split]
    ends: list[datetime | None] = [*begins[1:], None]
    deliveries = [each for each in deliveries if each.type == "session.status_run_started"]
    events = [event for event in session.log if event["processed_at"]]
    told = []
    for milestones, begin, end in zip(split, begins, ends, strict=True):
        within = [_milestone(session, each) for each in milestones]
        within += _webhook([each for each in deliveries if begin <= each.at and (end is None or each.at < end)])
        within += _events([event for event in events if _is_within(event, begin, end)])
        within.sort(key=lambda step: (step.at, _ORDER.index(step.name) if step.name in _ORDER else len(_ORDER)))
        told.append({"began_at": stamp(begin), "steps": [_shown(step, begin) for step in within]})
    return told


def _split(milestones: Iterable[Milestone]) -> Iterator[list[Milestone]]:
    """By their order and not by their time: a lease that lapses may be queued again at the same instant."""
    part: list[Milestone] = []
    for milestone in milestones:
        if milestone.name == "queued" and part:
            yield part
            part = []
        part.append(milestone)
    yield part


def _milestone(session: Session, it: Milestone) -> Step:
    is_creation = it.name == "queued" and it.at == session.created_at
    note = f"{it.times} times, this was the first" if it.times > 1 else ""
    return Step("created" if is_creation else it.name, it.at, note, is_bad=it.name == "lapsed")


def _webhook(deliveries: Sequence[Delivery]) -> Iterator[Step]:
    """The first that was taken, of the many that one round may send; where none was, the first attempt."""
    each = next((each for each in deliveries if each.is_ok), deliveries[0] if deliveries else None)
    if each is not None:
        answer = each.status if each.status is not None else each.error
        yield Step("webhook", each.at, f"attempt {each.attempt}: {answer} after {each.ms} ms", is_bad=not each.is_ok)


def _events(events: Sequence[Event]) -> Iterator[Step]:
    """The first call, the first result, and the last end of a turn."""
    call = next((event for event in events if event["type"] in _CALLS), None)
    if call is not None:
        yield Step("first tool", _at(call), str(call["name"]))
    result = next((event for event in events if event["type"] in _RESULTS), None)
    if result is not None:
        yield Step("first result", _at(result))
    idle = next((event for event in reversed(events) if event["type"] == "session.status_idle"), None)
    if idle is not None and idle["stop_reason"]["type"] != "requires_action":
        yield Step("idle", _at(idle), idle["stop_reason"]["type"])


def _is_within(event: Event, begin: datetime, end: datetime | None) -> bool:
    return stamp(begin) <= event["processed_at"] and (end is None or event["processed_at"] < stamp(end))


def _at(event: Event) -> datetime:
    return datetime.fromisoformat(event["processed_at"])


def _shown(step: Step, begin: datetime) -> Json:
    ms = round((step.at - begin).total_seconds() * 1000, 1)
    return {"name": step.name, "at": stamp(step.at), "ms": ms, "note": step.note, "is_bad": step.is_bad}
