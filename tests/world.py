"""One environment under test: the emulator, a provider, and a host that drains and sweeps when told to."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tests.folders import Folder
from tools.emulator import Emulator

PATIENCE_SECONDS = 60.0  # a hung test ends here; nothing waits this long when it works
RECLAIM_SECONDS = 121.0  # past the dispatcher's window: an un-acked item is offered again
LAPSE_SECONDS = 361.0  # past the lease and the server's sweeper
HEALABLE_SECONDS = 61.0  # past the wait before a stopped item is looked at


class Core(Protocol):
    """A copy of the shared core: `shared` itself, or a provider folder's `_shared`."""

    def shared(self, name: str) -> ModuleType: ...


class SharedCore:
    """The core as it is in this repository."""

    def shared(self, name: str) -> ModuleType:
        return importlib.import_module(f"shared.{name}")


class World:
    """What a contract test works with."""

    def __init__(self, emulator: Emulator, core: Core | Folder, make_provider: Callable[..., Any], root: Path) -> None:
        self.emulator = emulator
        self.core = core
        self._make_provider = make_provider
        self._root = root
        self._providers: list[Any] = []
        self._dispatchers: list[Any] = []

    @property
    def base_url(self) -> str:
        """The API, as hosts and sandboxes reach it."""
        return self.emulator.url

    def host(
        self,
        *,
        provider: Any = None,
        options: dict[str, Any] | None = None,
        timing: Mapping[str, Any] | None = None,
        **settings: str,
    ) -> Host:
        """A host process's worth: settings, a provider on the common root (or the given one) and a dispatcher, which
        `timing` gives other times than a real one has."""
        loaded = self.core.shared("settings").Settings.from_env(
            {
                "ANTHROPIC_ENVIRONMENT_ID": self.emulator.environment_id,
                "ANTHROPIC_ENVIRONMENT_KEY": self.emulator.environment_key,
                "ANTHROPIC_BASE_URL": self.base_url,
                "SANDBOX_MAX_IDLE_SECONDS": "1",
                **settings,
            }
        )
        if provider is None:
            provider = self._make_provider(self._root, loaded, **(options or {}))
            self._providers.append(provider)
        dispatching = self.core.shared("dispatcher")
        dispatcher = dispatching.Dispatcher(
            client=dispatching.open_client(loaded), settings=loaded, provider=provider, **(timing or {})
        )
        self._dispatchers.append(dispatcher)
        return Host(self.emulator, dispatcher, provider)

    async def close(self) -> None:
        for dispatcher in self._dispatchers:
            await dispatcher.close(5.0)
        for provider in self._providers:
            await provider.close()


class Host:
    """One dispatcher over one provider, and the waits a test needs. All of them wait on the emulator's state."""

    def __init__(self, emulator: Emulator, dispatcher: Any, provider: Any) -> None:
        self.emulator = emulator
        self.dispatcher = dispatcher
        self.provider = provider

    async def ask(self, session_id: str, text: str) -> str:
        """Sends a message, lets the host serve it, and returns what the agent says at the end of the turn."""
        self.emulator.say(session_id, text)
        await self.dispatcher.drain()
        return await self.answer(session_id)

    async def answer(self, session_id: str) -> str:
        """What the agent says at the end of the turn under way."""
        await asyncio.to_thread(self.emulator.wait_idle, session_id, PATIENCE_SECONDS)
        return self.said(session_id)

    def said(self, session_id: str) -> str:
        """The agent's last message."""
        text: str = self.emulator.events(session_id, "agent.message")[-1]["content"][0]["text"]
        return text

    async def until(self, predicate: Callable[[], Any]) -> None:
        await asyncio.to_thread(self.emulator.wait_until, predicate, PATIENCE_SECONDS)

    async def until_stopped(self, session_id: str) -> None:
        await self.until(lambda: self.emulator.work(session_id)["state"] == "stopped")

    async def until_called(self, session_id: str, calls: int = 1) -> None:
        """Until a runner has the session's tool call in its hands: claimed, event stream read."""
        await self.until(
            lambda: self.claims() >= calls and len(self.emulator.events(session_id, "agent.tool_use")) >= calls
        )

    def claims(self) -> int:
        """First heartbeats that were answered 200."""
        return sum(
            record.operation == "work.heartbeat"
            and record.status == 200
            and record.query.get("expected_last_heartbeat") == ["NO_HEARTBEAT"]
            for record in self.emulator.requests
        )

    def count(self, operation: str, status: int | None = None) -> int:
        """How many requests of a kind the emulator has answered."""
        return sum(
            record.operation == operation and status in (None, record.status) for record in self.emulator.requests
        )

    def results(self, session_id: str) -> list[tuple[bool, str]]:
        """(is_error, text) of every tool result in the session's log."""
        return [
            (bool(event.get("is_error")), "".join(block.get("text", "") for block in event.get("content") or []))
            for event in self.emulator.events(session_id, "user.tool_result", "user.custom_tool_result")
        ]
