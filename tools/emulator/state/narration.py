"""How it is told: the recorded order of the events around runs, model requests, calls and idles. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from ..agents import Call, Delegate
from .sessions import OpenCall, Session, Turn
from .threads import INPUT_TOKENS, OUTPUT_TOKENS, Thread

Notify = Callable[[str, str, datetime], None]
"""Called with a webhook type, the session's id and the moment of the transition."""

_EVALUATION = {"allow": "always_allow", "ask": "always_ask"}


class Narration:
    def __init__(self, notify: Notify) -> None:
        self._notify = notify

    def run(self, session: Session, thread: Thread | None, now: datetime) -> None:
        session.status = "running"
        session.meter.start(now)
        session.emit("session.status_running", now)
        self.run_thread(session, thread, now)
        self._notify("session.status_run_started", session.id, now)

    def run_thread(self, session: Session, thread: Thread | None, now: datetime) -> None:
        if thread is not None:
            thread.status = "running"
            thread.updated_at = now
            thread.meter.start(now)
        session.emit_in(thread, "session.thread_status_running", now, is_shown=True, **_name(session, thread))

    def idle(self, session: Session, thread: Thread | None, stop_reason: dict[str, Any], now: datetime) -> None:
        was_running = session.status == "running"
        session.meter.stop(now)
        session.status = "idle"
        self.idle_thread(session, thread, stop_reason, now)
        session.emit("session.usage", now, usage=session.meter.usage(), budget=None)
        session.emit("session.status_idle", now, stop_reason=stop_reason, stop_details=None)
        if was_running:
            self._notify("session.status_idled", session.id, now)

    def idle_thread(self, session: Session, thread: Thread | None, stop_reason: dict[str, Any], now: datetime) -> None:
        if thread is not None:
            thread.ended("idle", now)
        fields = {**_name(session, thread), "stop_reason": stop_reason, "stop_details": None}
        session.emit_in(thread, "session.thread_status_idle", now, is_shown=True, **fields)

    def open_request(self, session: Session, turn: Turn, now: datetime) -> None:
        if turn.model_request_id is None:
            event = session.emit_in(turn.thread, "span.model_request_start", now, is_shown=False)
            turn.model_request_id = event["id"]

    def close_request(self, session: Session, turn: Turn, now: datetime, *, is_error: bool = False) -> None:
        if turn.model_request_id is None:
            return
        usage = {
            "input_tokens": INPUT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "speed": "standard",
        }
        fields = {"model_request_start_id": turn.model_request_id, "is_error": is_error, "model_usage": usage}
        session.emit_in(turn.thread, "span.model_request_end", now, is_shown=False, **fields)
        session.meter.model_requests += 1
        if turn.thread is not None:
            turn.thread.meter.model_requests += 1
        turn.model_request_id = None

    def call(self, session: Session, turn: Turn, call: Call, now: datetime) -> OpenCall:
        fields: dict[str, Any] = {"name": call.name, "input": call.input}
        if not call.is_custom:
            fields["evaluated_permission"] = call.permission
            if call.permission in _EVALUATION:  # absent when the server refused it before any policy applied (SDK)
                fields["evaluation"] = {"type": _EVALUATION[call.permission]}
        type_ = "agent.custom_tool_use" if call.is_custom else "agent.tool_use"
        event = session.emit_in(turn.thread, type_, now, is_shown=True, **fields, session_thread_id=None)
        is_free = call.is_custom or call.permission == "allow"
        return OpenCall(event["id"], call, is_confirmed=is_free, thread=turn.thread)

    def say(self, session: Session, turn: Turn, text: str, now: datetime) -> None:
        session.emit_in(turn.thread, "agent.message", now, is_shown=False, content=_text(text))

    def delegate(self, session: Session, delegation: Delegate, now: datetime) -> Thread:
        """The new thread is announced where its caller speaks, then gets its message."""
        thread = Thread(delegation.agent_name, now, now)
        session.threads[thread.id] = thread
        told = {"agent_name": thread.agent_name, "session_thread_id": thread.id, "workflow_run_id": None}
        session.emit("session.thread_created", now, **told)
        content = _text(delegation.message)
        receiver = {"to_session_thread_id": thread.id, "to_agent_name": thread.agent_name}
        session.emit("agent.thread_message_sent", now, content=content, **receiver)
        sender = {"from_session_thread_id": session.thread_id, "from_agent_name": None}
        session.emit_in(thread, "agent.thread_message_received", now, is_shown=False, content=content, **sender)
        return thread

    def answer(self, session: Session, thread: Thread, text: str, now: datetime) -> None:
        """The sub-agent's last words reach its caller."""
        content = _text(text)
        receiver = {"to_session_thread_id": session.thread_id, "to_agent_name": None}
        session.emit_in(thread, "agent.thread_message_sent", now, is_shown=False, content=content, **receiver)
        sender = {"from_session_thread_id": thread.id, "from_agent_name": thread.agent_name}
        session.emit("agent.thread_message_received", now, content=content, **sender)


def last_words(thread: Thread) -> str:
    said = [event for event in thread.log if event["type"] == "agent.message"]
    return str(said[-1]["content"][0]["text"]) if said else ""


def _name(session: Session, thread: Thread | None) -> dict[str, str]:
    if thread is not None:
        return {"agent_name": thread.agent_name, "session_thread_id": thread.id}
    return {"agent_name": session.agent["name"], "session_thread_id": session.thread_id}


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]
