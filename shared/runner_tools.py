"""Every tool the agent can call, wrapped (R5): it starts only under a fresh lease, and ends with the runner.

The SDK shields a running tool from cancellation, so a tool that must end is cancelled here, inside that shield; what
its commands left behind is killed by process.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anthropic.lib.tools import BetaAsyncBuiltinFunctionTool, BetaFunctionToolResultType, ToolError
from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401

from . import runner_process
from .runner_lease import Lease

KILL_SECONDS = 5.0  # from the moment a call must end to the moment nothing of it runs
INTERRUPTED = "the sandbox was shut down while this ran; it may have taken effect"
NOT_STARTED = "the sandbox is shutting down; this was not started"

ToolFactory = Callable[[AgentToolContext], Sequence[Any]]


def load_custom_tools(reference: str | None) -> ToolFactory:
    """The function behind SANDBOX_TOOLS: `module:function`, or `/path/to/file.py:function`. It gets the SDK's
    `AgentToolContext` and returns a list of SDK tools. Raises ImportError, AttributeError or OSError."""
    if reference is None:
        return lambda context: ()
    where, _, function = reference.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None:
            raise ImportError(f"SANDBOX_TOOLS: {where} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    factory: ToolFactory = getattr(module, function)
    return factory


class Guard:
    """What stands between the SDK's dispatcher and a tool."""

    def __init__(self, lease: Lease, leaving: asyncio.Event, emit: Callable[..., None]) -> None:
        self._lease = lease
        self._leaving = leaving
        self._emit = emit

    def tools(self, custom: ToolFactory) -> Callable[[AgentToolContext], list[Any]]:
        """The tool factory for the SDK's worker.

        It lists the bare tools, which the SDK cleans up at the end, and then the wrapped ones under the same names:
        of two tools of one name the SDK calls the later.
        """

        def build(context: AgentToolContext) -> list[Any]:
            bare = [*beta_agent_toolset_20260401(context), *custom(context)]
            return [*bare, *(GuardedTool(tool, self) for tool in bare)]

        return build

    async def run(self, tool: Any, tool_input: object) -> BetaFunctionToolResultType:
        """Runs one call, or raises the `ToolError` that tells the agent why it did not run to its end."""
        await self._lease.wait_fresh()
        if self._must_end:
            raise ToolError(NOT_STARTED)
        began = time.monotonic()
        running = asyncio.ensure_future(_call(tool, tool_input))
        ending = [asyncio.ensure_future(event.wait()) for event in self._ends]
        try:
            await asyncio.wait([running, *ending], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in ending:
                wait.cancel()
            if not running.done():
                running.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([running], timeout=KILL_SECONDS)
        interrupted = not running.done() or running.cancelled()
        failed = interrupted or running.exception() is not None
        self._emit("tool", name=tool.name, ms=round((time.monotonic() - began) * 1000), is_error=failed)
        if interrupted:
            runner_process.kill_descendants()
            raise ToolError(INTERRUPTED)
        result: BetaFunctionToolResultType = running.result()
        return result

    @property
    def _ends(self) -> tuple[asyncio.Event, ...]:
        return (self._leaving, self._lease.lost, self._lease.stopping)

    @property
    def _must_end(self) -> bool:
        return any(event.is_set() for event in self._ends)


class GuardedTool(BetaAsyncBuiltinFunctionTool):
    """A tool of the same name that goes through the guard."""

    def __init__(self, tool: Any, guard: Guard) -> None:
        self._tool = tool
        self._guard = guard

    @property
    def name(self) -> str:
        return str(self._tool.name)

    def to_dict(self) -> Any:
        return self._tool.to_dict()

    async def call(self, input: object) -> BetaFunctionToolResultType:
        return await self._guard.run(self._tool, input)


async def _call(tool: Any, tool_input: object) -> Any:
    """A sync tool runs on a thread; one that must end is left behind there, its result dropped."""
    if inspect.iscoroutinefunction(tool.call):
        return await tool.call(tool_input)
    return await anyio.to_thread.run_sync(tool.call, tool_input, abandon_on_cancel=True)
