"""What the runner relies on in the SDK, each by itself: an upgrade that changes one of these fails here and says which.

Against the emulator, with the SDK's own worker and no part of the runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anthropic import APIRequest, AsyncAnthropic, AsyncAPIResponse, Middleware
from anthropic.lib.environments import EnvironmentWorker, SessionToolRunner
from anthropic.lib.tools import ToolError, beta_async_tool, beta_tool
from anthropic.lib.tools.agent_toolset import BASH_DEFAULT_TIMEOUT, beta_agent_toolset_20260401
from anthropic.types.beta.environments import BetaSelfHostedWork

from shared.runner_claim import BEAT_SECONDS, SETTLE_SECONDS
from tests.runner.proxy import Proxy
from tests.runner.support import is_alive, operations, poll, results, until, wait_file, wait_idle
from tools.emulator import Emulator, custom, end, repeat_output

CallNext = Callable[[Any], Awaitable[AsyncAPIResponse[Any]]]

PUBLIC = {
    "anthropic": "APIError APIRequest APIStatusError AsyncAPIResponse AsyncAnthropic Middleware NotFoundError",
    "anthropic.lib.environments": "EnvironmentWorker",
    "anthropic.lib.tools": (
        "BetaAsyncBuiltinFunctionTool BetaBuiltinFunctionTool BetaFunctionTool BetaFunctionToolResultType ToolError"
    ),
    "anthropic.lib.tools.agent_toolset": "AgentToolContext beta_agent_toolset_20260401",
    "anthropic.types.beta.environments": "BetaSelfHostedWork BetaSelfHostedWorkHeartbeatResponse",
    "anthropic.types.beta.sessions": "BetaManagedAgentsSendSessionEvents",
}


class Watch(Middleware):
    """Writes down every attempt, and answers a stop itself when asked to."""

    def __init__(self, *, answers_stops: bool = False) -> None:
        self.attempts: list[tuple[str, str, int]] = []
        self.statuses: list[int] = []
        self._answers_stops = answers_stops

    async def handle_async(self, request: APIRequest, call_next: CallNext) -> Any:
        self.attempts.append((request.method.lower(), request.url, request.retries_taken))
        if self._answers_stops and request.url.endswith("/stop"):
            return BetaSelfHostedWork.model_construct(id="made here")
        response = await call_next(request)
        self.statuses.append(response.status_code)
        return response


class Bench:
    """The SDK's own worker, and the client it was given."""

    def __init__(self, emulator: Emulator, client: AsyncAnthropic, workdir: Path) -> None:
        self.client = client
        self._emulator = emulator
        self._workdir = workdir

    async def serve(self, tools: Any = None, max_idle: float = 0.2) -> None:
        """Acks the next hand-out and serves it."""
        item = await poll(self._emulator)
        await self.client.beta.environments.work.ack(item.id, environment_id=item.environment_id)
        worker = EnvironmentWorker(self.client, workdir=self._workdir, tools=tools, max_idle=max_idle)
        await worker.handle_item(
            work_id=item.id,
            environment_id=item.environment_id,
            session_id=item.data.id,
            environment_key=self._emulator.environment_key,
        )


Open = Callable[..., Bench]


@pytest.fixture
async def bench(emulator: Emulator, proxy: Proxy, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens a bench, through the proxy, with these options of the client."""
    async with contextlib.AsyncExitStack() as stack:

        def open_bench(**options: Any) -> Bench:
            client = AsyncAnthropic(auth_token=emulator.environment_key, base_url=proxy.url, **options)
            stack.push_async_callback(client.close)
            return Bench(emulator, client, tmp_path)

        yield open_bench


@pytest.fixture
def session_id(emulator: Emulator) -> str:
    return emulator.create_session()


@pytest.mark.parametrize("module", PUBLIC)
def test_the_names_are_where_we_import_them_from(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(loaded, name)] == []


async def test_middleware_sees_every_attempt_with_its_status(emulator: Emulator, proxy: Proxy, bench: Open) -> None:
    watch = Watch()
    proxy.answer("ack", 500, times=2)
    session_id = emulator.create_session()
    client = bench(middleware=[watch], max_retries=2).client
    await client.beta.environments.work.ack(session_id, environment_id=emulator.environment_id)
    assert watch.statuses == [500, 500, 200]
    assert [retries for _, _, retries in watch.attempts] == [0, 1, 2]


async def test_middleware_survives_the_workers_scoped_copies_and_with_options(
    emulator: Emulator, session_id: str, bench: Open
) -> None:
    watch = Watch()
    opened = bench(middleware=[watch])
    emulator.say(session_id, "!echo hello")
    await opened.serve()
    ends = {url.rpartition("/")[2] for _, url, _ in watch.attempts}
    assert {"ack", "heartbeat", "stream", "events", "stop", session_id} <= ends
    seen = len(watch.attempts)
    await opened.client.with_options(max_retries=0, timeout=5).beta.sessions.retrieve(session_id)
    assert len(watch.attempts) == seen + 1


async def test_middleware_may_answer_by_itself(emulator: Emulator, session_id: str, bench: Open) -> None:
    opened = bench(middleware=[Watch(answers_stops=True)])
    emulator.say(session_id, "!echo hello")
    await opened.serve()
    stopped = await opened.client.beta.environments.work.stop(session_id, environment_id=emulator.environment_id)
    assert stopped.id == "made here"
    assert operations(emulator, "work.stop") == []
    assert emulator.work(session_id)["state"] == "active"


async def test_middleware_may_change_the_query_and_parse_answers(
    emulator: Emulator, session_id: str, bench: Open
) -> None:
    class Condition(Middleware):
        parsed: Any = None

        async def handle_async(self, request: APIRequest, call_next: CallNext) -> Any:
            if request.url.endswith("/heartbeat"):
                assert request.query_params["expected_last_heartbeat"] == "to be replaced"
                request = request.copy(params={**request.query_params, "expected_last_heartbeat": "NO_HEARTBEAT"})
            response = await call_next(request)
            self.parsed = await response.parse()
            return response

    condition = Condition()
    work = bench(middleware=[condition]).client.beta.environments.work
    await work.ack(session_id, environment_id=emulator.environment_id)
    beat = await work.heartbeat(
        session_id, environment_id=emulator.environment_id, expected_last_heartbeat="to be replaced"
    )
    assert beat.state == "active"
    assert condition.parsed == beat


async def test_of_two_tools_of_one_name_the_later_is_called_and_both_are_cleaned_up(
    emulator: Emulator, session_id: str, bench: Open
) -> None:
    closed: list[str] = []

    def tool(answer: str) -> Any:
        @beta_async_tool(name="mine")
        async def mine() -> str:
            """Says which."""
            return answer

        mine.close = lambda: closed.append(answer)
        return mine

    emulator.set_script(session_id, [custom("mine"), repeat_output, end()])
    emulator.say(session_id, "go")
    await bench().serve([tool("earlier"), tool("later")])
    assert results(emulator, session_id) == ["later"]
    assert sorted(closed) == ["earlier", "later"]


async def test_handle_item_starts_with_no_heartbeat_beside_the_session(
    emulator: Emulator, proxy: Proxy, session_id: str, bench: Open
) -> None:
    """Why we claim before it, and put our own value in."""
    held = proxy.hold("beat")
    emulator.say(session_id, "!echo ran without a claim")
    serving = asyncio.create_task(bench().serve())
    await until(emulator, lambda: results(emulator, session_id))
    held.released.set()
    await serving
    first = next(record for record in emulator.requests if record.operation == "work.heartbeat")
    assert first.query["expected_last_heartbeat"] == ["NO_HEARTBEAT"]


@pytest.mark.parametrize("exit", ["idle", "cancelled", "the session cannot be read", "a beat is refused"])
async def test_handle_item_force_stops_on_exit(
    emulator: Emulator, proxy: Proxy, session_id: str, exit: str, bench: Open
) -> None:
    """Why every stop passes our guard."""
    emulator.say(session_id, "!echo hello")
    if exit == "the session cannot be read":
        proxy.answer("session", 500, times=3)
    if exit == "a beat is refused":
        proxy.answer("beat", 401)
    serving = asyncio.create_task(bench().serve(max_idle=60 if exit == "cancelled" else 0.2))
    if exit == "cancelled":
        await wait_idle(emulator, session_id)
        serving.cancel()
    await asyncio.wait([serving], timeout=60)
    assert serving.done()
    assert not serving.cancelled() or exit == "cancelled"
    if exit == "the session cannot be read":
        assert isinstance(serving.exception(), ExceptionGroup)
    assert emulator.work(session_id)["state"] == "stopped"


async def test_handle_item_leaves_a_lost_lease_alone(
    emulator: Emulator, proxy: Proxy, session_id: str, bench: Open
) -> None:
    proxy.answer("beat", 412)
    await bench().serve(max_idle=60)
    assert proxy.count("stop") == 0


async def test_a_lost_beat_leaves_three_pauses_between_two_that_are_recorded(
    emulator: Emulator, proxy: Proxy, session_id: str, bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a claim without an answer is settled no sooner (R2)."""
    waits: list[float] = []

    def shortened(wait: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(delay: float | None, *args: Any, **options: Any) -> Any:
            if delay == BEAT_SECONDS:
                waits.append(delay)
                delay = 0.5
            return wait(delay, *args, **options)

        return waiting

    for name in ("fail_after", "move_on_after"):
        monkeypatch.setattr(anyio, name, shortened(getattr(anyio, name)))
    serving = asyncio.create_task(bench().serve(max_idle=60))
    await proxy.wait_count("beat", 1)
    lost = proxy.hold("beat", is_answered=False)
    await proxy.wait_count("beat", 3)
    # The answer to the first, the pause, the answer to the lost one, the pause, the answer to the third.
    assert waits[:5] == [BEAT_SECONDS] * 5
    assert sum(waits[1:4]) < SETTLE_SECONDS < sum(waits[1:5])
    lost.released.set()
    serving.cancel()
    await asyncio.wait([serving], timeout=60)


async def test_a_running_tool_is_shielded_from_the_workers_end(
    emulator: Emulator, session_id: str, tmp_path: Path, bench: Open
) -> None:
    """Why the guard ends it from inside."""
    release = asyncio.Event()

    @beta_async_tool
    async def patient() -> str:
        """Waits."""
        (tmp_path / "begun").write_text("1")
        await release.wait()
        return "finished"

    emulator.set_script(session_id, [custom("patient"), repeat_output, end()])
    emulator.say(session_id, "go")
    serving = asyncio.create_task(bench().serve([patient]))
    await wait_file(tmp_path / "begun")
    serving.cancel()
    await asyncio.wait([serving], timeout=0.3)
    assert not serving.done()
    release.set()
    await asyncio.wait([serving], timeout=60)
    assert results(emulator, session_id) == ["finished"]


async def test_a_sync_tool_is_a_tool_of_these_classes() -> None:
    from anthropic.lib.tools import BetaBuiltinFunctionTool, BetaFunctionTool

    @beta_tool
    def sync() -> str:
        """Is sync."""
        return ""

    @beta_async_tool
    async def not_sync() -> str:
        """Is not."""
        return ""

    assert isinstance(sync, BetaFunctionTool)
    assert not isinstance(not_sync, BetaFunctionTool | BetaBuiltinFunctionTool)
    assert issubclass(ToolError, Exception)


def test_the_toolset_is_the_documented_one(tmp_path: Path) -> None:
    from anthropic.lib.tools.agent_toolset import AgentToolContext

    names = [tool.name for tool in beta_agent_toolset_20260401(AgentToolContext(workdir=tmp_path))]
    assert sorted(names) == ["bash", "edit", "glob", "grep", "read", "write"]


async def test_a_command_that_takes_too_long_says_so_in_the_cause_and_its_shell_is_gone(tmp_path: Path) -> None:
    from anthropic.lib.tools.agent_toolset import AgentToolContext

    bash = next(tool for tool in beta_agent_toolset_20260401(AgentToolContext(workdir=tmp_path)) if tool.name == "bash")
    with pytest.raises(ToolError) as raised:
        await bash.call({"command": "echo $$ > shell; sleep 300", "timeout_ms": 2000})
    assert isinstance(raised.value.__cause__, TimeoutError)
    assert not is_alive(int((tmp_path / "shell").read_text()))


async def test_a_materialised_answer_of_a_middleware_is_handed_on(
    emulator: Emulator, session_id: str, tmp_path: Path, bench: Open
) -> None:
    """Lists and streams pass through us parsed: what we leave out of a list, the SDK's worker does not see."""

    class Without(Middleware):
        async def handle_async(self, request: APIRequest, call_next: CallNext) -> Any:
            response = await call_next(request)
            if not request.url.endswith("/events") or request.method.lower() != "get":
                return response
            page = await response.parse()
            page.data = [event for event in page.data if event.type != "agent.tool_use"]
            return page

    emulator.say(session_id, "!echo hello > seen")
    serving = asyncio.create_task(bench(middleware=[Without()]).serve())
    await until(emulator, lambda: "events.list" in operations(emulator))
    emulator.send(session_id, {"type": "user.interrupt"})
    await serving
    assert not (tmp_path / "seen").exists()


def test_the_limit_of_a_call_is_above_the_limit_of_a_command() -> None:
    """Else the shell of a command that timed out would be left with it."""
    assert vars(sys.modules[SessionToolRunner.__module__])["TOOL_TIMEOUT"] > BASH_DEFAULT_TIMEOUT
