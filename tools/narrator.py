"""Tells a person what happens in a session while it happens, from what the emulator sees, and then how long it took."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TextIO

from tools.emulator import Emulator

_TEXT_LIMIT = 110  # characters of a tool's input or output on one line
_EVER_SECONDS = 10 * 365 * 86400.0
_COLOURS = {"you": "1", "agent": "36", "tool": "33", "work": "2", "webhook": "35"}


class Narrator:
    """Follows one session at a time. Lines carry the seconds since the last message was sent."""

    def __init__(self, emulator: Emulator, out: TextIO = sys.stdout) -> None:
        self._emulator = emulator
        self._out = out
        self._session = ""
        self._anything = False
        self._began: datetime = emulator.now()
        self._events = self._requests = self._deliveries = 0
        self._first: dict[str, datetime] = {}
        self._timelines: list[dict[str, datetime]] = []
        self.last_answer = ""
        self.idle = False
        self.stopped = False

    def begin(self, session: str, message: str | None) -> None:
        """Follows `session` from this message on (or, for None, through whatever messages come)."""
        self._anything = message is None
        self._session, self._began = session, self._emulator.now()
        self._first = {"message sent": self._began}
        self._timelines.append(self._first)
        self.idle = self.stopped = False
        if message is not None:
            self._tell(self._began, "you", message)

    def follow(self, done: Callable[[], bool], timeout: float | None) -> None:
        """Prints what happens until `done()`. Raises TimeoutError when nothing has for `timeout` seconds."""
        while not done():
            news = self._emulator.wait_until(self._news, timeout if timeout is not None else _EVER_SECONDS)
            for at, kind, text in sorted(news, key=lambda each: each[0]):
                self._tell(at, kind, text)

    def print_timeline(self) -> None:
        """The milliseconds from each message to each of its milestones, side by side."""
        labels = list(dict.fromkeys(label for timeline in self._timelines for label in timeline))
        heads = "".join(f"{f'message {number}':>14}" for number in range(1, len(self._timelines) + 1))
        self._print(f"\n  {'milliseconds after the message':<34}{heads}")
        for label in labels[1:]:
            cells = [_ms(timeline.get(label), timeline["message sent"]) for timeline in self._timelines]
            self._print(f"  {label:<34}{''.join(f'{cell:>14}' for cell in cells)}")

    # --- what is new -------------------------------------------------------------------------------------------------

    def _news(self) -> list[tuple[datetime, str, str]]:
        events = self._emulator.events(self._session)
        requests, deliveries = self._emulator.requests, self._emulator.deliveries
        news = [line for event in events[self._events :] if (line := self._event(event))]
        news += [line for request in requests[self._requests :] if (line := self._request(request))]
        news += [line for delivery in deliveries[self._deliveries :] if (line := self._delivery(delivery))]
        self._events, self._requests, self._deliveries = len(events), len(requests), len(deliveries)
        return news

    def _event(self, event: dict[str, Any]) -> tuple[datetime, str, str] | None:
        if not event.get("processed_at"):
            return None
        at = datetime.fromisoformat(event["processed_at"])
        match event["type"]:
            case "user.message" if self._anything:
                self._began = at
                return at, "you", _one_line(_text(event))
            case "agent.tool_use":
                arguments = "  ".join(f"{name}={_one_line(value)}" for name, value in event["input"].items())
                return at, "agent", f"calls {event['name']}  {arguments}"
            case "user.tool_result":
                self._note("first tool result", at)
                mark = "error: " if event.get("is_error") else ""
                return at, "tool", f"{mark}{_one_line(_text(event))}"
            case "agent.message":
                self.last_answer = _text(event)
                return at, "agent", f"says  {_one_line(self.last_answer)}"
            case "session.status_idle" if event["stop_reason"]["type"] == "end_turn":
                self.idle = True
                self._note("turn ended", at)
                return at, "work", "idle: the turn has ended"
        return None

    def _request(self, request: Any) -> tuple[datetime, str, str] | None:
        if request.status != 200 or self._session not in request.path:
            return None
        match request.operation:
            case "work.ack":
                self._note("sandbox ready, item acked", request.at)
                return request.at, "work", "sandbox ready: its runner has loaded the SDK and acks the work item"
            case "work.heartbeat" if request.query.get("expected_last_heartbeat") == ["NO_HEARTBEAT"]:
                self._note("claimed", request.at)
                return request.at, "work", "claimed: from now on this runner, and no other, may run tools"
            case "work.stop":
                self.stopped = True
                self._note("runner left", request.at)
                return request.at, "work", "no new message: the runner has stopped its work item and leaves"
        return None

    def _delivery(self, delivery: Any) -> tuple[datetime, str, str] | None:
        if delivery.session_id != self._session or delivery.type != "session.status_run_started":
            return None
        if "webhook answered" in self._first:
            return None
        answered_at = delivery.at + timedelta(milliseconds=delivery.ms)
        self._note("webhook answered", answered_at)
        return answered_at, "webhook", f"{delivery.type}: answered {delivery.status} in {delivery.ms} ms"

    # --- how it looks ------------------------------------------------------------------------------------------------

    def _note(self, label: str, at: datetime) -> None:
        self._first.setdefault(label, at)

    def _tell(self, at: datetime, kind: str, text: str) -> None:
        since = (at - self._began).total_seconds()
        label = f"{kind:<8}"
        if self._out.isatty():
            label = f"\x1b[{_COLOURS[kind]}m{label}\x1b[0m"
        self._print(f"  {f'+{since:.2f} s':>9}  {label} {text}")

    def _print(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def _text(event: dict[str, Any]) -> str:
    return "\n".join(block.get("text", "") for block in event.get("content") or [])


def _one_line(value: object) -> str:
    text = " | ".join(str(value).strip().splitlines())
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 3] + "..."


def _ms(at: datetime | None, since: datetime) -> str:
    return "" if at is None else f"{(at - since).total_seconds() * 1000:.0f}"
