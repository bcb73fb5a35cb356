"""The dispatchers of a schedule, and the webhooks that wake them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from anthropic import AsyncAnthropic

from shared import worker
from shared.dispatcher import Dispatcher
from shared.settings import Settings
from shared.webhook import WebhookEvent
from tests.faults import runners
from tests.faults.cloud import Cloud, CloudProvider
from tests.faults.control_plane import ControlPlane
from tests.faults.loop import Process, VirtualLoop
from tests.faults.numbers import number
from tests.faults.steps import OWN_TOOL, Schedule
from tests.faults.steps import Webhooks as WebhookTrouble
from tests.faults.wire import BASE_URL, Network, client_for

MAX_IDLE_SECONDS = 15.0
MAX_WAIT_SECONDS = 150.0
RETENTION_SECONDS = 600.0
_STAGGER_SECONDS = 11.0
_BACKOFF_SECONDS = (7.0, 30.0)


class Host:
    """One place where a dispatcher runs; when it dies, the next one starts with nothing."""

    def __init__(self, hosts: Hosts, index: int) -> None:
        self.index = index
        self.life = 0
        self.process: Process | None = None
        self.dispatcher: Dispatcher | None = None
        self._hosts = hosts

    @property
    def is_up(self) -> bool:
        return self.process is not None and not self.process.is_dead

    def start(self) -> None:
        self.life += 1
        self.process = self._hosts.loop.process(f"dispatcher {self.index}.{self.life}")
        task = self.process.spawn(self._main(self.process))
        task.add_done_callback(lambda done: self._hosts.ended(self, done))

    async def _main(self, process: Process) -> None:
        settings = self._hosts.settings()
        http = client_for(self._hosts.network, process)
        client = AsyncAnthropic(
            auth_token=settings.environment_key,
            base_url=settings.base_url,
            max_retries=2,
            timeout=30.0,
            http_client=http,
        )
        self.dispatcher = Dispatcher(client=client, settings=settings, provider=CloudProvider(self._hosts.cloud))
        await worker.run(self.dispatcher, stop=asyncio.Event(), poll=False, pause_seconds=(5.0, 8.0))

    def wake(self) -> None:
        if self.is_up and self.dispatcher is not None and self.process is not None:
            self._hosts.loop.call_soon(self.dispatcher.wake, context=self.process.context)


class Hosts:
    def __init__(
        self, loop: VirtualLoop, network: Network, cloud: Cloud, plane: ControlPlane, schedule: Schedule
    ) -> None:
        self.loop, self.network, self.cloud = loop, network, cloud
        self.troubles: list[WebhookTrouble] = []
        self.crashes: list[str] = []
        self._plane = plane
        self._stages = schedule.has_skills
        self._seed = schedule.seed
        self._sent = 0
        self._held: list[int] = []
        self.all = [Host(self, index) for index in range(schedule.hosts)]
        self._tasks: set[asyncio.Task[None]] = set()
        plane.on_transition = self.notify

    def settings(self) -> Settings:
        return Settings(
            environment_id=self._plane.environment_id,
            environment_key=self._plane.environment_key,
            base_url=BASE_URL,
            max_idle_seconds=MAX_IDLE_SECONDS,
            max_wait_seconds=MAX_WAIT_SECONDS,
            retention_seconds=RETENTION_SECONDS,
            tools=runners.TOOLS,
            tool_names=(OWN_TOOL,),
            stage_files=self._stages,
        )

    def start(self) -> None:
        for host in self.all:
            self.loop.call_later(_STAGGER_SECONDS * host.index, host.start)

    def kill(self, host: Host, steps: int, down_seconds: float) -> None:
        """SIGKILL, some steps from now, and a fresh start later."""
        if host.process is None or host.process.is_dead:
            return
        host.process.on_death.append(lambda: self._start_later(host, down_seconds))
        host.process.after(steps, host.process.die)

    def _start_later(self, host: Host, seconds: float) -> None:
        self.loop.call_later(seconds, host.start, context=self.network.server)

    def ended(self, host: Host, task: asyncio.Task[None]) -> None:
        if host.process is not None and not host.process.is_dead:
            error = None if task.cancelled() else task.exception()
            self.crashes.append(f"dispatcher {host.index}.{host.life} ended with {error!r}")

    # Webhooks

    def notify(self, type_: str, session_id: str) -> None:
        """One transition: a webhook that may be lost, late, repeated or out of order. All of them say the same."""
        if type_ == "session.status_idled":
            self._spawn(self._tell(session_id))
        if type_ != "session.status_run_started":
            return
        self._sent += 1
        trouble = self.troubles[0] if self.troubles else None
        if trouble is not None:
            self.troubles.pop(0)
            if trouble.count > 1:
                self.troubles.insert(0, WebhookTrouble(trouble.at, trouble.kind, trouble.count - 1, trouble.seconds))
        kind = trouble.kind if trouble else None
        if kind == "lose":
            return
        if kind == "reorder":
            self._held.append(self._sent)
            return
        late = trouble.seconds if trouble is not None and kind == "delay" else 0.0
        for webhook in [self._sent, *([self._sent] if kind == "duplicate" else []), *reversed(self._held)]:
            self._spawn(self._deliver(webhook, late))
        self._held.clear()

    def _spawn(self, main: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(main, context=self.network.server.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, session_id: str) -> None:
        """The webhook of a session that is idle now, for whoever is up; nobody depends on it."""
        await asyncio.sleep(0.3)
        host = next((host for host in self.all if host.is_up and host.dispatcher is not None), None)
        if host is not None and host.dispatcher is not None:
            host.dispatcher.suspect(WebhookEvent("whe_idled", "session.status_idled", session_id))

    async def _deliver(self, webhook: int, late: float) -> None:
        luck = number(self._seed, "webhook", webhook)
        await asyncio.sleep(0.05 + 0.4 * luck + late)
        for pause in (*_BACKOFF_SECONDS, 0.0):
            host = self.all[int(luck * 1000 + webhook) % len(self.all)]
            if host.is_up:
                host.wake()
                return
            await asyncio.sleep(pause)

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
