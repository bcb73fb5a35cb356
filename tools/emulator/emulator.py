"""The emulator as one object: a server to start and stop, and hands for tests to reach into it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Self

from . import pages, replies
from .admin import Admin
from .agents import Step
from .clock import Clock
from .credentials import Credentials
from .engine import Engine
from .faults import Faults
from .params import EnvironmentCreateBody, EventsBody, SelfHosted, SessionCreateBody, parse
from .requests import Control, RequestRecord
from .routes import OPERATIONS, application
from .server import LOOPBACK, Server
from .shelf import Json, Shelf
from .shown import ShownClock
from .state import Event
from .state.ids import new_api_key, new_environment_key, new_webhook_key
from .switches import Switches
from .troubles import Execution, Troubles
from .watch import Watch
from .webhooks import TIMEOUT_SECONDS, Delivery, Notification, WebhookSender


class Emulator(Shelf, Troubles, Watch):
    """A local control plane with one environment and one agent to begin with.

    Nothing listens before `start()`, nothing is left after `stop()`; `with Emulator() as emulator:` does both. The
    state can be read and changed from any thread, also before the start. Methods that wait block their thread: from a
    coroutine, call them through `asyncio.to_thread`.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        environment_id: str | None = None,
        environment_key: str | None = None,
        api_key: str | None = None,
        webhook_url: str | None = None,
        webhook_key: str | None = None,
        webhook_types: Collection[str] | None = None,
        webhook_timeout: float = TIMEOUT_SECONDS,
        lease_ttl: float = 300,
        switches: Switches | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        if lease_ttl < 1:
            raise ValueError("lease_ttl is at least 1 second")
        switches = replace(switches or Switches())  # a copy of its own: `switch` changes it
        self.clock = clock or Clock()
        self.api_key = api_key or new_api_key()
        self.environment_key = environment_key or new_environment_key()
        self.webhook_key = webhook_key or new_webhook_key()
        self.requests: list[RequestRecord] = []
        self.deliveries: list[Delivery] = []
        self.executions: list[Execution] = []
        self._host, self._port = host, port
        self._server: Server | None = None
        self._engine = Engine(self.clock, switches, timedelta(seconds=lease_ttl), self._notify)
        self._world = self._engine.world
        self._credentials = Credentials(self.api_key, switches)
        self._faults = Faults(self._engine, OPERATIONS)
        self._shown = ShownClock(self.clock)
        self._webhooks = WebhookSender(
            self._engine, self.webhook_key, webhook_url, webhook_types, webhook_timeout, self._delivered, self._shown
        )
        environment = self._world.create_environment(_environment("emulator"), self.clock.now(), environment_id)
        self.environment_id = environment.id
        self._credentials.add_environment_key(self.environment_key, environment.id)
        self.agent_id = self._create_agent(())

    # Life

    def start(self) -> Self:
        if self._server is not None:
            raise RuntimeError("the emulator is running")
        control = Control(self._engine, self._credentials, self._faults, self._shown, self.requests)
        is_local = self._host in LOOPBACK
        self._server = Server(
            application(control, [*pages.routes(is_local=is_local), *Admin(self, is_local=is_local).routes()]),
            self._engine,
            self._webhooks,
            self._host,
            self._port,
        )
        self._faults.hang_up = self._server.hang_up
        self._server.start()
        return self

    def stop(self) -> None:
        """Stop serving; the state stays readable. Does nothing when it is not running."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        if self._server is None:
            raise RuntimeError("the emulator has not been started")
        return self._server.url

    # Time

    def now(self) -> datetime:
        return self.clock.now()

    def advance(self, seconds: float) -> None:
        """Jump the clock. Leases, scripted sleeps and their events are settled on return; webhook retries follow."""
        self.clock.advance(seconds)

    # Sessions

    @property
    def default_script(self) -> Sequence[Step]:
        """What the agent of every session created from now on does; empty means the shell-like agent."""
        return self._world.default_script

    @default_script.setter
    def default_script(self, steps: Sequence[Step]) -> None:
        self._world.default_script = tuple(steps)

    def set_script(self, session_id: str, steps: Sequence[Step]) -> None:
        """What the session's agent does from its next turn on. The shell-like agent takes over when it has run out."""
        with self._engine.transact():
            session = self._world.session(session_id)
            session.script = type(session.script)(steps)

    def create_environment(self, name: str = "another") -> tuple[str, str]:
        """A second environment: its id and its key (which no API mints)."""
        key = new_environment_key()
        with self._engine.transact() as now:
            environment_id = self._world.create_environment(_environment(name), now).id
        self._credentials.add_environment_key(key, environment_id)
        return environment_id, key

    def create_session(
        self,
        title: str | None = None,
        metadata: dict[str, str] | None = None,
        environment_id: str | None = None,
        *,
        skills: Sequence[str | Json] = (),
        resources: Sequence[str | Json] = (),
    ) -> str:
        """`skills`: ids (of the latest version) or wire skills, which an agent made for this session gets.
        `resources`: ids of memory stores or wire resources."""
        agent_id = self._create_agent(skills) if skills else self.agent_id
        values = {
            "agent": agent_id,
            "environment_id": environment_id or self.environment_id,
            "title": title,
            "metadata": metadata or {},
            "resources": self._resources(resources),
        }
        body = parse(SessionCreateBody, values, "body")
        with self._engine.transact() as now:
            return self._world.create_session(body, now).id

    def send(self, session_id: str, *events: Event) -> list[Event]:
        """Send events as a client would; raises the error the client would see."""
        inbound = parse(EventsBody, {"events": list(events)}, "body").events
        with self._engine.transact() as now:
            return self._world.send(session_id, inbound, now)

    def say(self, session_id: str, text: str) -> Event:
        return self.send(session_id, {"type": "user.message", "content": [{"type": "text", "text": text}]})[0]

    def archive_session(self, session_id: str) -> None:
        with self._engine.transact() as now:
            self._world.archive_session(session_id, now)

    def delete_session(self, session_id: str) -> None:
        with self._engine.transact() as now:
            self._world.delete_session(session_id, now)

    def session(self, session_id: str) -> dict[str, Any]:
        """The wire session."""
        with self._engine.transact() as now:
            return replies.session(self._world.session(session_id), now)

    def events(self, session_id: str, *types: str) -> list[Event]:
        """The session's wire events in order, or those of the given types."""
        with self._engine.transact():
            events = self._world.session(session_id).events()
        return [event for event in events if not types or event["type"] in types]

    def pending_calls(self, session_id: str) -> list[str]:
        """The ids of the tool calls the session waits for."""
        with self._engine.transact():
            return self._world.session(session_id).pending_ids()

    # Work

    def work(self, session_id: str) -> dict[str, Any]:
        """The session's wire work item (KeyError when it has none)."""
        with self._engine.transact():
            session = self._world.session(session_id)
            item = self._world.queue(session.environment_id).of_session(session_id)
            if item is None:
                raise KeyError(session_id)
            return replies.work(item)

    def stop_work(self, session_id: str, force: bool = False) -> dict[str, Any]:
        """An operator's stop; returns the item as the stop left it."""
        with self._engine.transact() as now:
            session = self._world.session(session_id)
            work_id = self.work(session_id)["id"]
            item = self._world.queue(session.environment_id).stop(work_id, now, force=force)
            reply = replies.work(item)
            self._world.stopped(item, now)
            return reply

    def stats(self) -> dict[str, Any]:
        with self._engine.transact() as now:
            return dict(self._world.queue(self.environment_id).stats(now))

    # Webhooks

    def _notify(self, type_: str, session_id: str, at: datetime) -> None:
        self._webhooks.notify(Notification(type_, session_id, at))

    def _delivered(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        self._engine.ring()


def _environment(name: str) -> EnvironmentCreateBody:
    return EnvironmentCreateBody(name=name, config=SelfHosted(type="self_hosted"))
