"""How a session goes through a turn, step by step of the agent's script.

On a self-hosted session every tool call ends the model request and makes the session idle with `requires_action`, also
when the call is allowed; partial results repeat that idle with the remaining ids and no running in between (recorded).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from ..agents import Call, Delegate, End, Error, Say, Sleep, ToolResult, Tools, shell_agent
from ..errors import Invalid
from ..switches import Switches
from .agenda import Agenda
from .narration import Narration, Notify, last_words
from .sessions import Event, OpenCall, Session, Turn, text_of
from .threads import Thread

END_TURN: dict[str, Any] = {"type": "end_turn"}
RETRIES_EXHAUSTED: dict[str, Any] = {"type": "retries_exhausted"}


class Turns:
    """The model's side of all sessions."""

    def __init__(self, notify: Notify, switches: Switches) -> None:
        self._tell = Narration(notify)
        self._switches = switches
        self._sleepers: Agenda[Session] = Agenda(_resumes_at, lambda session: session.id)

    def next_sleeper(self) -> tuple[datetime, Session] | None:
        """The session whose scripted sleep is over next, and when."""
        return self._sleepers.first()

    # Input

    def start_next(self, session: Session, now: datetime) -> None:
        """Start a turn for the oldest waiting message, unless a turn is under way; one message, one turn."""
        while session.turn is None and session.inbox and session.status != "terminated":
            message = session.inbox.popleft()
            steps = session.script if session.script else deque(shell_agent(text_of(message["content"])))
            session.turn = Turn(steps)
            self._tell.run(session, None, now)
            session.record(message, now)  # recorded: after the running events, not before
            self._continue(session, session.turn, now)

    def resume(self, session: Session, now: datetime) -> None:
        """Go on after a scripted sleep."""
        if session.turn is not None:
            session.turn.resumes_at = None
            self._continue(session, session.turn, now)
        self.start_next(session, now)

    def confirm(self, session: Session, event: Event, now: datetime) -> None:
        """Apply a verdict on a held call.

        An allowed call goes on waiting, for its result. Inferred: the session runs for an instant when nothing else is
        open, because a resolved request for action makes it run, and is idle again since its sandbox has to act.
        """
        turn = _turn_of(session)
        open_call = turn.open_calls[event["tool_use_id"]]
        session.record(event, now, open_call.thread)
        if event["result"] == "deny":
            message = event.get("deny_message") or "The user denied this call."
            self._resolve(session, turn, _denied(open_call, message), now)
            return
        open_call.is_confirmed = True
        if len(turn.open_calls) == 1:
            self._tell.run(session, turn.thread, now)
        self._wait(session, turn, now)

    def take_result(self, session: Session, event: Event, call_id: str, now: datetime) -> None:
        late = session.left_open.pop(call_id, None)
        if late is not None:
            # Inferred: a late result of an interrupted turn is kept and changes nothing. The idle is repeated, as after
            # a partial result, so that the runner that posted it sees the end of the turn again.
            session.record(event, now, late.thread)
            if session.turn is None:
                self._tell.idle(session, None, END_TURN, now)
            return
        turn = _turn_of(session)
        open_call = turn.open_calls[call_id]
        session.record(event, now, open_call.thread)
        is_error = bool(event.get("is_error"))
        result = ToolResult(call_id, open_call.call.name, event.get("content") or [], is_error)
        self._resolve(session, turn, result, now)

    def interrupt(self, session: Session, event: Event, thread_id: str | None, now: datetime) -> None:
        """End the turn with `end_turn` and leave its open calls unanswered; waiting messages follow (documented).

        An interrupt that names the thread of a sub-agent ends that thread's work only, and its caller goes on (SDK).
        """
        thread = session.threads.get(thread_id or "")
        session.record(event, now, thread)
        turn = session.turn
        if thread is not None:
            if turn is not None and turn.thread is thread:
                self._cut_off(session, turn, thread, now)
            return
        session.turn = None
        last = None
        if turn is not None:
            last = turn.thread
            self._tell.close_request(session, turn, now)
            self._leave(session, turn, now)
            _drop_rest(turn)
        if last is not None:
            self._tell.idle_thread(session, last, END_TURN, now)
        self._tell.idle(session, None, END_TURN, now)
        self.start_next(session, now)

    def archive_thread(self, session: Session, thread: Thread, now: datetime) -> None:
        """The thread is terminated: it takes no result any more, and a caller that waits for it goes on (inferred)."""
        if thread.archived_at is not None:
            return
        thread.archived_at = now
        turn = session.turn
        is_working = turn is not None and turn.thread is thread
        if turn is not None and is_working:
            self._tell.close_request(session, turn, now)
            turn.open_calls.clear()
        session.left_open = {id_: call for id_, call in session.left_open.items() if call.thread is not thread}
        thread.ended("terminated", now)
        named = {"agent_name": thread.agent_name, "session_thread_id": thread.id}
        session.emit_in(thread, "session.thread_status_terminated", now, is_shown=True, **named)
        if turn is not None and is_working:
            self._return(session, turn, thread, "The thread was archived.", now, is_error=True)

    def _cut_off(self, session: Session, turn: Turn, thread: Thread, now: datetime) -> None:
        self._tell.close_request(session, turn, now)
        self._leave(session, turn, now)
        self._tell.idle_thread(session, thread, END_TURN, now)
        self._return(session, turn, thread, "The sub-agent was interrupted.", now, is_error=True)

    def _return(
        self, session: Session, turn: Turn, thread: Thread, text: str, now: datetime, *, is_error: bool
    ) -> None:
        """The caller goes on with what it got, running again if it waited for an answer to the sub-agent's calls."""
        turn.come_back(ToolResult(thread.id, thread.agent_name, [{"type": "text", "text": text}], is_error))
        if session.status != "running":
            self._tell.run(session, None, now)
        self._continue(session, turn, now)
        self.start_next(session, now)

    def _leave(self, session: Session, turn: Turn, now: datetime) -> None:
        """What becomes of the calls of an interrupted turn is open: a switch."""
        if self._switches.interrupted_call == "left_open":
            session.left_open.update(turn.open_calls)
        else:
            content = [{"type": "text", "text": "The call was interrupted."}]
            for call_id in turn.open_calls:
                fields = {"tool_use_id": call_id, "content": content, "is_error": True}
                session.emit_in(turn.thread, "agent.tool_result", now, is_shown=True, **fields)
        turn.open_calls = {}

    def _resolve(self, session: Session, turn: Turn, result: ToolResult, now: datetime) -> None:
        del turn.open_calls[result.tool_use_id]
        turn.results.append(result)
        if turn.open_calls:
            self._wait(session, turn, now)
            return
        self._tell.run(session, turn.thread, now)
        self._continue(session, turn, now)
        self.start_next(session, now)

    # Steps

    def _continue(self, session: Session, turn: Turn, now: datetime) -> None:
        """Take steps until the turn sleeps, waits for results or is over."""
        while session.turn is turn:
            match _next_step(turn):
                case End():
                    self._finish(session, turn, END_TURN, now)
                case Say(text):
                    self._tell.open_request(session, turn, now)
                    self._tell.say(session, turn, text, now)
                case Sleep(seconds):
                    self._tell.open_request(session, turn, now)
                    turn.resumes_at = now + timedelta(seconds=seconds)
                    self._sleepers.note(session)
                    return
                case Error(message):
                    self._fail(session, turn, message, now)
                case Delegate() as delegation:
                    self._delegate(session, turn, delegation, now)
                case Tools(calls):
                    self._tell.open_request(session, turn, now)
                    turn.results = []
                    for call in calls:
                        self._call(session, turn, call, now)
                    self._tell.close_request(session, turn, now)
                    if turn.open_calls:
                        self._wait(session, turn, now)
                        return

    def _call(self, session: Session, turn: Turn, call: Call, now: datetime) -> None:
        open_call = self._tell.call(session, turn, call, now)
        if call.permission == "deny":  # the denial resolves the call: nobody posts a result for it (SDK)
            turn.results.append(_denied(open_call, "This call is not permitted."))
        else:
            turn.open_calls[open_call.id] = open_call

    def _delegate(self, session: Session, turn: Turn, delegation: Delegate, now: datetime) -> None:
        if turn.thread is not None:
            raise Invalid("the script's sub-agent delegates, which sub-agents cannot")
        self._tell.open_request(session, turn, now)
        thread = self._tell.delegate(session, delegation, now)
        self._tell.close_request(session, turn, now)
        turn.thread, turn.callers_steps, turn.steps = thread, turn.steps, deque(delegation.steps)
        turn.results = []
        self._tell.run_thread(session, thread, now)

    def _fail(self, session: Session, turn: Turn, message: str, now: datetime) -> None:
        self._tell.open_request(session, turn, now)
        self._tell.close_request(session, turn, now, is_error=True)
        fault = {"type": "unknown_error", "message": message, "retry_status": {"type": "exhausted"}}
        session.emit_in(turn.thread, "session.error", now, is_shown=True, error=fault)
        if turn.steps and isinstance(turn.steps[0], End):
            turn.steps.popleft()
        self._finish(session, turn, RETRIES_EXHAUSTED, now)

    def _wait(self, session: Session, turn: Turn, now: datetime) -> None:
        stop_reason = {"type": "requires_action", "event_ids": list(turn.open_calls)}
        self._tell.idle(session, turn.thread, stop_reason, now)

    def _finish(self, session: Session, turn: Turn, stop_reason: dict[str, Any], now: datetime) -> None:
        """The end of the turn, or of the sub-agent's part of it."""
        self._tell.close_request(session, turn, now)
        thread = turn.thread
        if thread is None:
            session.turn = None
            self._tell.idle(session, None, stop_reason, now)
            return
        text = last_words(thread)
        self._tell.answer(session, thread, text, now)
        self._tell.idle_thread(session, thread, stop_reason, now)
        content = [{"type": "text", "text": text}]
        turn.come_back(ToolResult(thread.id, thread.agent_name, content, stop_reason is RETRIES_EXHAUSTED))


def _resumes_at(session: Session) -> datetime | None:
    return session.turn.resumes_at if session.turn else None


def _turn_of(session: Session) -> Turn:
    if session.turn is None:
        raise AssertionError(f"session {session.id} waits for nothing")
    return session.turn


def _denied(open_call: OpenCall, message: str) -> ToolResult:
    return ToolResult(open_call.id, open_call.call.name, [{"type": "text", "text": message}], is_error=True)


def _drop_rest(turn: Turn) -> None:
    """What an interrupted turn had left is not for the next message."""
    steps = turn.callers_steps if turn.thread else turn.steps
    while steps and not isinstance(steps.popleft(), End):
        pass


def _next_step(turn: Turn) -> Say | Tools | Sleep | Error | Delegate | End:
    """The next plain step: a function is asked for its steps, a bare call is a group of one."""
    while turn.steps:
        step = turn.steps.popleft()
        if callable(step):
            more = step(tuple(turn.results))
            turn.steps.extendleft(reversed(more if isinstance(more, Sequence) else [more]))
            continue
        return Tools((step,)) if isinstance(step, Call) else step
    return End()
