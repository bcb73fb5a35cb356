"""The emulator without its server: the application for the network, and its clock and bell on the schedule's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.faults.loop import EPOCH, VirtualLoop
from tools.emulator import Clock, Emulator, Switches
from tools.emulator.requests import Control
from tools.emulator.routes import application
from tools.emulator.state import Session, WorkItem


class ControlPlane(Emulator):
    """The control plane of one schedule."""

    def __init__(self, switches: dict[str, Any]) -> None:
        super().__init__(switches=Switches(**switches), clock=Clock(datetime.fromtimestamp(EPOCH, UTC)))
        self.on_transition: Callable[[str, str], None] = lambda type_, session_id: None
        control = Control(self._engine, self._credentials, self._faults, self._shown, self.requests)
        self.app = application(control)

    def open(self, loop: VirtualLoop) -> asyncio.Task[None]:
        self._engine.open(loop)
        return loop.create_task(self._engine.keep_time())

    def close(self) -> None:
        self._engine.close()

    def _notify(self, type_: str, session_id: str, at: datetime) -> None:
        self.on_transition(type_, session_id)

    # The truth, as no client sees it

    def truth(self, session_id: str) -> Session | None:
        return self._world.sessions.get(session_id)

    def item(self, session_id: str) -> WorkItem | None:
        return self._world.queue(self.environment_id).of_session(session_id)

    def item_by_id(self, work_id: str) -> WorkItem | None:
        return self._world.queue(self.environment_id).find(work_id)

    def has_work(self, session_id: str) -> bool:
        """Whether the session waits for anything: a turn is under way, or a message has not had its own."""
        session = self.truth(session_id)
        return session is not None and session.status != "terminated" and bool(session.turn or session.inbox)

    def rotate_key(self) -> str:
        """A new environment key; the old one is refused from now on."""
        old, self.environment_key = self.environment_key, f"{self.environment_key}-next"
        self._credentials.add_environment_key(self.environment_key, self.environment_id)
        del self._credentials._known[old]
        return self.environment_key
