"""Every tool the agent can call, wrapped (R5): it starts only under a fresh lease, is written down before it runs, and
ends with the runner.

The SDK shields a running tool from cancellation, so a tool that must end is cancelled here, inside that shield; what
its commands left behind is killed by process.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anthropic.lib.tools import (
    BetaAsyncBuiltinFunctionTool,
    BetaBuiltinFunctionTool,
    BetaFunctionTool,
    BetaFunctionToolResultType,
    ToolError,
)
from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401

from .runner_events import OWNED_TOOLS, EventLog
from .runner_journal import Journal
from .runner_lease import Lease, first_of

KILL_SECONDS = 5.0  # from the moment a call must end to the moment nothing of it runs
INTERRUPTED = "the sandbox was shut down while this ran; it may have taken effect"
NOT_STARTED = "the sandbox is shutting down; this was not started"
TURN_INTERRUPTED = "the turn was interrupted before this was run; nothing of it was run"
BEGUN_BEFORE = "this was begun before and its answer was lost; it may have taken effect, and was not run again"

_RUN_AGAIN = frozenset({"read", "glob", "grep"})  # they change nothing

ToolFactory = Callable[[AgentToolContext], Sequence[Any]]
Mark = Callable[[], Callable[[], object]]
"""Called before a call; what it returns ends the processes that were started since."""


def load_custom_tools(reference: str | None) -> ToolFactory:
    """The function behind SANDBOX_TOOLS: `module:function`, or `/path/to/file.py:function`. It gets the SDK's
    `AgentToolContext` and returns a list of SDK tools. Raises ImportError, AttributeError or OSError."""
    if reference is None:
        return lambda context: ()
    where, _, function = reference.rpartition(":")
    if not where or not function:
        raise ImportError("SANDBOX_TOOLS is not of the form module:function or /path/to/file.py:function")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None:
            raise ImportError(f"SANDBOX_TOOLS: {where} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    factory: ToolFactory = getattr(module, function)
    if not callable(factory):
        raise ImportError(f"SANDBOX_TOOLS: {function} is not a function")
    return factory


class Guard:
    """What stands between the SDK's dispatcher and a tool. `kill` ends every process below the runner."""

    def __init__(
        self,
        lease: Lease,
        leaving: asyncio.Event,
        emit: Callable[..., None],
        kill: Callable[[], object],
        kill_seconds: float = KILL_SECONDS,
        *,
        log: EventLog,
        journal: Journal,
        mark: Mark = lambda: lambda: None,
        named: Collection[str] = (),
    ) -> None:
        self._named = named
        self._lease = lease
        self._log = log
        self._journal = journal
        self._mark = mark
        self._ends = (leaving, lease.lost, lease.stopping)
        self._emit = emit
        self._kill = kill
        self._kill_seconds = kill_seconds
        self.owned = OWNED_TOOLS.union(named)
        """The names of the tools that are ours to run: as we were told, and exactly once the SDK has asked for them."""
        self.running = 0
        self.is_set_up = False
        """The SDK has asked for the tools: it got the session, its skills and its memory."""

    def tools(self, custom: ToolFactory) -> Callable[[AgentToolContext], list[Any]]:
        """The tool factory for the SDK's worker.

        It lists the bare tools, which the SDK cleans up at the end, and then the wrapped ones under the same names:
        of two tools of one name the SDK calls the later.
        """

        def build(context: AgentToolContext) -> list[Any]:
            self.is_set_up = True
            bare = [*beta_agent_toolset_20260401(context), *custom(context)]
            self.owned = OWNED_TOOLS.union(tool.name for tool in bare)
            if unnamed := sorted(self.owned.difference(OWNED_TOOLS, self._named)):
                reason = "not in SANDBOX_TOOL_NAMES: nobody answers their calls when this sandbox is lost"
                self._emit("unnamed", tools=unnamed, reason=reason)
            return [*bare, *(GuardedTool(tool, self) for tool in bare)]

        return build

    async def run(self, tool: Any, tool_input: object) -> BetaFunctionToolResultType:
        """Runs one call, or raises the `ToolError` that tells the agent why it did not run to its end."""
        await self._lease.wait_fresh(*self._ends)
        if self._must_end:
            raise ToolError(NOT_STARTED)
        self._begin(tool.name, tool_input)
        began, kill_leftovers = time.monotonic(), self._mark()
        running = asyncio.ensure_future(_call(tool, tool_input))
        self.running += 1
        try:
            await first_of(running, *(event.wait() for event in self._ends))
        finally:
            if not running.done():  # it must end, or the SDK's own time limit for a call is over
                running.cancel()
                if self._must_end:
                    self._kill()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([running], timeout=self._kill_seconds)
            self.running -= 1
            interrupted = not running.done() or running.cancelled()
            error = None if interrupted else running.exception()
            if interrupted or isinstance(getattr(error, "__cause__", None), TimeoutError):
                kill_leftovers()  # the SDK ended the shell, and only that
            failed = interrupted or error is not None
            self._emit("tool", name=tool.name, ms=round((time.monotonic() - began) * 1000), is_error=failed)
        if interrupted:
            raise ToolError(INTERRUPTED)
        result: BetaFunctionToolResultType = running.result()
        return result

    def _begin(self, name: str, tool_input: object) -> None:
        """P3: takes the call down before it runs, or raises. The SDK says which tool and which input; the log we heard
        says which call: the first of those that wait which was not begun."""
        calls = [call for call in self._log.open.values() if call.name == name and call.input == tool_input]
        if not calls and any(c.name == name and c.input == tool_input for c in self._log.interrupted.values()):
            raise ToolError(TURN_INTERRUPTED)
        if not calls or name in _RUN_AGAIN:
            return
        call = next((call for call in calls if call.id not in self._journal), None)
        if call is None:
            raise ToolError(BEGUN_BEFORE)
        if not self._journal.begin(call.id):
            self._emit("retry", error="the journal cannot be written", attempt=0)

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
    """As the SDK calls it. A sync tool runs on a thread; one that must end is left behind there, its result dropped."""
    if isinstance(tool, BetaFunctionTool | BetaBuiltinFunctionTool):
        return await anyio.to_thread.run_sync(tool.call, tool_input, abandon_on_cancel=True)
    result = tool.call(tool_input)
    return await result if inspect.isawaitable(result) else result
