"""How a session goes through a turn: the recorded order of events, step by step of the agent's script.

On a self-hosted session every tool call ends the model request and makes the session idle with `requires_action`, also
when the call is allowed; partial results repeat that idle with the remaining ids and no running in between (recorded).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from tools.emulator.agents import Call, End, Error, Say, Sleep, ToolResult, Tools, shell_agent
from tools.emulator.switches import Switches

from .sessions import INPUT_TOKENS, OUTPUT_TOKENS, Event, OpenCall, Session, Turn, text_of

Notify = Callable[[str, str, datetime], None]
"""Called with a webhook type, the session's id and the moment of the transition."""

END_TURN: dict[str, Any] = {"type": "end_turn"}
RETRIES_EXHAUSTED: dict[str, Any] = {"type": "retries_exhausted"}
_EVALUATION = {"allow": "always_allow", "ask": "always_ask"}


class Turns:
    """The model's side of all sessions."""

    def __init__(self, notify: Notify, switches: Switches) -> None:
        self._notify = notify
        self._switches = switches

    # Input

    def start_next(self, session: Session, now: datetime) -> None:
        """Start a turn for the oldest waiting message, unless a turn is under way; one message, one turn."""
        while session.turn is None and session.inbox and session.status != "terminated":
            message = session.inbox.popleft()
            steps = session.script if session.script else deque(shell_agent(text_of(message["content"])))
            session.turn = Turn(steps)
            self._run(session, now)
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
        session.record(event, now)
        open_call = turn.open_calls[event["tool_use_id"]]
        if event["result"] == "deny":
            message = event.get("deny_message") or "The user denied this call."
            self._resolve(session, turn, _denied(open_call, message), now)
            return
        open_call.is_confirmed = True
        if len(turn.open_calls) == 1:
            self._run(session, now)
        self._wait(session, turn, now)

    def take_result(self, session: Session, event: Event, call_id: str, now: datetime) -> None:
        session.record(event, now)
        if call_id in session.left_open:
            # Inferred: a late result of an interrupted turn is kept and changes nothing. The idle is repeated, as after
            # a partial result, so that the runner that posted it sees the end of the turn again.
            del session.left_open[call_id]
            if session.turn is None:
                self._idle(session, END_TURN, now)
            return
        turn = _turn_of(session)
        open_call = turn.open_calls[call_id]
        is_error = bool(event.get("is_error"))
        result = ToolResult(call_id, open_call.call.name, event.get("content") or [], is_error)
        self._resolve(session, turn, result, now)

    def interrupt(self, session: Session, event: Event, now: datetime) -> None:
        """End the turn with `end_turn` and leave its open calls unanswered; waiting messages follow (documented)."""
        session.record(event, now)
        turn, session.turn = session.turn, None
        if turn is not None:
            self._close_request(session, turn, now)
            self._leave(session, turn, now)
            _drop_rest(turn)
        self._idle(session, END_TURN, now)
        self.start_next(session, now)

    def _leave(self, session: Session, turn: Turn, now: datetime) -> None:
        """What becomes of the calls of an interrupted turn is open: a switch."""
        if self._switches.interrupted_call == "left_open":
            session.left_open.update(turn.open_calls)
            return
        content = [{"type": "text", "text": "The call was interrupted."}]
        for call_id in turn.open_calls:
            session.emit("agent.tool_result", now, tool_use_id=call_id, content=content, is_error=True)

    def _resolve(self, session: Session, turn: Turn, result: ToolResult, now: datetime) -> None:
        del turn.open_calls[result.tool_use_id]
        turn.results.append(result)
        if turn.open_calls:
            self._wait(session, turn, now)
            return
        self._run(session, now)
        self._continue(session, turn, now)
        self.start_next(session, now)

    # Steps

    def _continue(self, session: Session, turn: Turn, now: datetime) -> None:
        """Take steps until the turn sleeps, waits for results or is over."""
        while True:
            match _next_step(turn):
                case End():
                    self._finish(session, turn, END_TURN, now)
                    return
                case Say(text):
                    self._open_request(session, turn, now)
                    session.emit("agent.message", now, content=[{"type": "text", "text": text}])
                case Sleep(seconds):
                    self._open_request(session, turn, now)
                    turn.resumes_at = now + timedelta(seconds=seconds)
                    return
                case Error(message):
                    self._open_request(session, turn, now)
                    self._close_request(session, turn, now, is_error=True)
                    fault = {"type": "unknown_error", "message": message, "retry_status": {"type": "exhausted"}}
                    session.emit("session.error", now, error=fault)
                    if turn.steps and isinstance(turn.steps[0], End):
                        turn.steps.popleft()
                    self._finish(session, turn, RETRIES_EXHAUSTED, now)
                    return
                case Tools(calls):
                    self._open_request(session, turn, now)
                    turn.results = []
                    for call in calls:
                        self._call(session, turn, call, now)
                    self._close_request(session, turn, now)
                    if turn.open_calls:
                        self._wait(session, turn, now)
                        return

    def _call(self, session: Session, turn: Turn, call: Call, now: datetime) -> None:
        if call.is_custom:
            event = session.emit("agent.custom_tool_use", now, name=call.name, input=call.input, session_thread_id=None)
        else:
            permission = call.permission
            fields: dict[str, Any] = {"name": call.name, "input": call.input, "evaluated_permission": permission}
            if permission in _EVALUATION:  # absent when the server refused the call before any policy applied (SDK)
                fields["evaluation"] = {"type": _EVALUATION[permission]}
            event = session.emit("agent.tool_use", now, **fields, session_thread_id=None)
        is_free = call.is_custom or call.permission == "allow"
        open_call = OpenCall(event["id"], call, is_confirmed=is_free)
        if call.permission == "deny":  # the denial resolves the call: nobody posts a result for it (SDK)
            turn.results.append(_denied(open_call, "This call is not permitted."))
        else:
            turn.open_calls[open_call.id] = open_call

    # Events

    def _run(self, session: Session, now: datetime) -> None:
        session.status = "running"
        session.running_since = now
        session.emit("session.status_running", now)
        session.emit("session.thread_status_running", now, **_thread(session))
        self._notify("session.status_run_started", session.id, now)

    def _wait(self, session: Session, turn: Turn, now: datetime) -> None:
        self._idle(session, {"type": "requires_action", "event_ids": list(turn.open_calls)}, now)

    def _finish(self, session: Session, turn: Turn, stop_reason: dict[str, Any], now: datetime) -> None:
        self._close_request(session, turn, now)
        session.turn = None
        self._idle(session, stop_reason, now)

    def _idle(self, session: Session, stop_reason: dict[str, Any], now: datetime) -> None:
        was_running = session.status == "running"
        if session.running_since is not None:
            session.active += now - session.running_since
            session.running_since = None
        session.status = "idle"
        session.emit("session.thread_status_idle", now, **_thread(session), stop_reason=stop_reason, stop_details=None)
        session.emit("session.usage", now, usage=session.usage(), budget=None)
        session.emit("session.status_idle", now, stop_reason=stop_reason, stop_details=None)
        if was_running:
            self._notify("session.status_idled", session.id, now)

    def _open_request(self, session: Session, turn: Turn, now: datetime) -> None:
        if turn.model_request_id is None:
            turn.model_request_id = session.emit("span.model_request_start", now)["id"]

    def _close_request(self, session: Session, turn: Turn, now: datetime, *, is_error: bool = False) -> None:
        if turn.model_request_id is None:
            return
        usage = {
            "input_tokens": INPUT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "speed": "standard",
        }
        session.emit(
            "span.model_request_end",
            now,
            model_request_start_id=turn.model_request_id,
            is_error=is_error,
            model_usage=usage,
        )
        session.model_requests += 1
        turn.model_request_id = None


def _thread(session: Session) -> dict[str, Any]:
    return {"agent_name": session.agent["name"], "session_thread_id": session.thread_id}


def _turn_of(session: Session) -> Turn:
    if session.turn is None:
        raise AssertionError(f"session {session.id} waits for nothing")
    return session.turn


def _denied(open_call: OpenCall, message: str) -> ToolResult:
    return ToolResult(open_call.id, open_call.call.name, [{"type": "text", "text": message}], is_error=True)


def _drop_rest(turn: Turn) -> None:
    """What an interrupted turn had left is not for the next message."""
    while turn.steps and not isinstance(turn.steps.popleft(), End):
        pass


def _next_step(turn: Turn) -> Say | Tools | Sleep | Error | End:
    """The next plain step: a function is asked for its steps, a bare call is a group of one."""
    while turn.steps:
        step = turn.steps.popleft()
        if callable(step):
            more = step(tuple(turn.results))
            turn.steps.extendleft(reversed(more if isinstance(more, Sequence) else [more]))
            continue
        return Tools((step,)) if isinstance(step, Call) else step
    return End()
