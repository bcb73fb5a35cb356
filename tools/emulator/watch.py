"""Waiting for a session to get somewhere, and looking over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Literal, TypeVar

from .engine import Engine, wait_event
from .scripts_yaml import FAILED
from .state import Session

T = TypeVar("T")
WAIT_SECONDS = 60.0  # for a machine that has other things to do; what is waited for comes at once as a rule
Awaited = Literal["idle", "requires_action", "queued", "starting", "active", "stopping", "stopped"]
"""Of a session or of its work item: `idle` is after an ended turn with nothing left to process."""


class Watch:
    """The part of `Emulator` that waits; `_engine` is the emulator's."""

    _engine: Engine

    def hold(self) -> AbstractContextManager[datetime]:
        """Nothing else happens while it is held: several calls in one go. Yields the time; never wait in it."""
        return self._engine.transact()

    def wait_until(self, predicate: Callable[[], T], timeout: float = WAIT_SECONDS) -> T:
        """The predicate's first true value; asked again at every change, in this thread, with the state locked."""
        return self._engine.wait_until(predicate, timeout)

    def wait_idle(self, session_id: str, timeout: float = WAIT_SECONDS) -> None:
        """Until the session is idle after an ended turn and has nothing left to process."""
        self.wait_for(session_id, "idle", timeout)

    def wait_for(self, session_id: str, state: Awaited, timeout: float = WAIT_SECONDS) -> None:
        """Until the session, or its work item, is in this state."""
        self.wait_until(lambda: self.is_in(session_id, state), timeout)

    async def until(self, predicate: Callable[[], bool], seconds: float) -> bool:
        """`wait_until` on the server's loop; False when the time is over or the emulator closes."""
        deadline = time.monotonic() + seconds
        with self._engine.listen() as changed:
            while True:
                changed.clear()
                with self._engine.transact():
                    if predicate():
                        return True
                left = deadline - time.monotonic()
                if left <= 0 or self._engine.is_closing:
                    return False
                await wait_event(changed, left)

    def is_in(self, session_id: str, state: Awaited) -> bool:
        with self._engine.transact():
            session = self._engine.world.session(session_id)
            if state == "idle":
                return _is_idle(session)
            if state == "requires_action":
                return session.status == "idle" and bool(session.pending_ids())
            item = self._engine.world.queue(session.environment_id).of_session(session_id)
            return item is not None and item.state == state

    def session_ids(self) -> list[str]:
        """Every session that exists, the oldest first."""
        with self._engine.transact():
            return list(self._engine.world.sessions)

    def failed_expectations(self) -> list[str]:
        """What the `expect` steps of the scripts have found wrong."""
        with self._engine.transact():
            sessions = list(self._engine.world.sessions.values())
            return [
                f"{session.id}: {message.removeprefix(FAILED)}"
                for session in sessions
                for event in session.log
                if event["type"] == "session.error" and (message := event["error"]["message"]).startswith(FAILED)
            ]


def _is_idle(session: Session) -> bool:
    if session.turn is not None or session.inbox or session.status != "idle":
        return False
    last = next((event for event in reversed(session.log) if event["type"] == "session.status_idle"), None)
    return last is not None and last["stop_reason"]["type"] == "end_turn"
