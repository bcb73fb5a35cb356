"""What the event log adds up to (R4): whether a turn is over, and what waits for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shared.runner_events import EventLog

_ids = iter(range(10**6))


def event(kind: str, *, processed: bool = True, **fields: Any) -> Any:
    return SimpleNamespace(id=str(next(_ids)), type=kind, processed_at="now" if processed else None, **fields)


def idle(*awaited: str) -> Any:
    stop_reason = SimpleNamespace(type="requires_action" if awaited else "end_turn", event_ids=list(awaited))
    return event("session.status_idle", stop_reason=stop_reason)


def use(call_id: str, thread_id: str | None = None) -> Any:
    permission = {"evaluated_permission": "allow", "session_thread_id": thread_id}
    return SimpleNamespace(id=call_id, type="agent.tool_use", name="bash", input={}, processed_at="now", **permission)


def fold(*events: Any, settled: tuple[str, ...] = ()) -> EventLog:
    log = EventLog(settled)
    for each in events:
        log.note(each)
    return log


RUNNING = event("session.status_running")
SAID = event("user.message")
WAITS = event("user.message", processed=False)
INTERRUPT = event("user.interrupt", session_thread_id=None)
RESULT = event("user.tool_result", tool_use_id="call")
VERDICT = event("user.tool_confirmation", tool_use_id="call", result="allow")


@pytest.mark.parametrize(
    ("events", "is_over"),
    [
        ((), False),
        ((RUNNING,), False),
        ((RUNNING, idle()), True),
        ((RUNNING, idle("call")), False),
        ((RUNNING, idle(), WAITS), False),
        ((RUNNING, idle(), SAID), False),  # taken up, and the session does not say yet that it runs
        ((RUNNING, idle(), INTERRUPT), False),
        ((RUNNING, idle(), RESULT), False),
        ((RUNNING, idle(), VERDICT), True),  # starts no turn by itself
        ((RUNNING, idle(), SAID, RUNNING, idle()), True),
        ((WAITS, event("session.status_terminated")), False),
        ((SAID, event("session.status_terminated")), True),
        ((SAID, event("session.deleted")), True),
    ],
)
def test_a_turn_is_over_when_nothing_came_after_its_end(events: tuple[Any, ...], is_over: bool) -> None:
    assert fold(*events).is_over is is_over


def test_an_answer_to_what_is_settled_is_no_input() -> None:
    assert fold(RUNNING, idle(), RESULT, settled=("call",)).is_over
    assert fold(RUNNING, use("call"), INTERRUPT, idle(), RESULT).is_over


def test_before_the_first_message_a_session_only_waits() -> None:
    assert fold().only_waits({"bash"})
    assert not fold(SAID).only_waits({"bash"})
    assert not fold(WAITS).only_waits({"bash"})


def test_a_session_only_waits_while_none_of_its_open_calls_is_ours() -> None:
    assert not fold(RUNNING, use("call"), idle("call")).only_waits({"bash"})
    assert fold(RUNNING, use("call"), idle("call")).only_waits({"other"})


def test_an_interrupt_ends_the_calls_of_its_thread_and_a_thread_that_ended_has_none() -> None:
    threads = (event("session.thread_status_running", session_thread_id="main"), use("a"), use("b", "sub"))
    assert list(fold(*threads, INTERRUPT).open) == []
    of_main = fold(*threads, event("user.interrupt", session_thread_id="main"))
    assert (list(of_main.open), list(of_main.interrupted)) == (["b"], ["a"])
    ended = fold(*threads, event("session.thread_status_terminated", session_thread_id="sub"))
    assert (list(ended.open), list(ended.interrupted)) == (["a"], [])
