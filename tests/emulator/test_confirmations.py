"""Calls that wait for a verdict, with the SDK's tool runner on the other side, and calls it does not own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from anthropic import AsyncAnthropic, beta_async_tool
from anthropic.lib.tools._beta_session_runner import DispatchedToolCall

from tests.emulator.support import custom_result, idles, types_of
from tools.emulator import Call, Emulator, call, custom, end, repeat_output, tools
from tools.emulator.agents import Permission

executed: list[str] = []


@pytest.fixture(autouse=True)
def _clean() -> None:
    executed.clear()


@beta_async_tool
async def bash(command: str) -> str:
    """Note the command and repeat it."""
    executed.append(command)
    return f"ran {command}"


def start(emulator: Emulator, *calls: Call) -> str:
    session_id = emulator.create_session()
    emulator.set_script(session_id, [tools(*calls), repeat_output, end()])
    emulator.say(session_id, "go")
    return session_id


def verdict(call_id: str, result: str, message: str | None = None) -> dict[str, Any]:
    return {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": result, "deny_message": message}


def said(emulator: Emulator, session_id: str) -> str:
    text: str = emulator.events(session_id, "agent.message")[-1]["content"][0]["text"]
    return text


async def drive(owner: AsyncAnthropic, session_id: str) -> list[DispatchedToolCall]:
    runner = owner.beta.sessions.events.tool_runner(session_id, tools=[bash], max_idle=0.05)
    return [each async for each in runner]


@pytest.fixture
async def driven(owner: AsyncAnthropic) -> AsyncIterator[Any]:
    """Start the runner and come back when it listens."""
    tasks: list[asyncio.Task[list[DispatchedToolCall]]] = []

    async def start_runner(emulator: Emulator, session_id: str) -> asyncio.Task[list[DispatchedToolCall]]:
        task = asyncio.create_task(drive(owner, session_id))
        tasks.append(task)
        listed = lambda: any(record.operation == "events.list" for record in emulator.requests)  # noqa: E731
        await asyncio.to_thread(emulator.wait_until, listed)
        return task

    yield start_runner
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_allowed_call_runs_after_its_verdict(
    emulator: Emulator, owner: AsyncAnthropic, driven: Any, when: str
) -> None:
    """Whether the runner finds the verdict in the history or hears it."""
    session_id = start(emulator, call("bash", permission="ask", command="a"))
    (call_id,) = emulator.pending_calls(session_id)
    if when == "before":
        emulator.send(session_id, verdict(call_id, "allow"))
        calls = await drive(owner, session_id)
    else:
        task = await driven(emulator, session_id)
        assert executed == []
        emulator.send(session_id, verdict(call_id, "allow"))
        calls = await task

    assert executed == ["a"]
    assert [(each.tool_use_id, each.confirmation, each.posted) for each in calls] == [(call_id, "allow", True)]
    assert said(emulator, session_id) == "ran a"
    waiting = {"type": "requires_action", "event_ids": [call_id]}
    assert idles(emulator, session_id) == [waiting, waiting, {"type": "end_turn"}]


async def test_a_denied_call_never_runs(emulator: Emulator, driven: Any) -> None:
    session_id = start(emulator, call("bash", permission="ask", command="a"))
    (call_id,) = emulator.pending_calls(session_id)
    task = await driven(emulator, session_id)
    emulator.send(session_id, verdict(call_id, "deny", "Not on Sundays."))
    calls = await task

    assert executed == []
    assert [(each.confirmation, each.posted, each.result) for each in calls] == [("deny", False, None)]
    assert said(emulator, session_id) == "Error: Not on Sundays."
    assert emulator.events(session_id, "user.tool_result") == []


async def test_a_call_the_policy_denies_resolves_itself(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = start(emulator, call("bash", permission="deny", command="a"))
    calls = await drive(owner, session_id)
    assert executed == []
    assert [(each.confirmation, each.posted) for each in calls] == [("deny", False)]
    assert [reason["type"] for reason in idles(emulator, session_id)] == ["end_turn"]


async def test_parallel_calls_of_every_permission(emulator: Emulator, driven: Any) -> None:
    permissions: list[Permission] = ["allow", "ask", "deny", "ask"]
    session_id = start(
        emulator, *(call("bash", permission=each, command=str(index)) for index, each in enumerate(permissions))
    )
    uses = [event["id"] for event in emulator.events(session_id, "agent.tool_use")]
    task = await driven(emulator, session_id)
    await asyncio.to_thread(emulator.wait_until, lambda: len(emulator.pending_calls(session_id)) == 2)
    emulator.send(session_id, verdict(uses[3], "allow"), verdict(uses[1], "deny"))
    calls = await task

    assert sorted(executed) == ["0", "3"]
    assert {each.tool_use_id: each.confirmation for each in calls} == {
        uses[0]: None,
        uses[1]: "deny",
        uses[2]: "deny",
        uses[3]: "allow",
    }
    answered = {event["tool_use_id"] for event in emulator.events(session_id, "user.tool_result")}
    assert answered == {uses[0], uses[3]}
    assert idles(emulator, session_id)[0]["event_ids"] == [uses[0], uses[1], uses[3]]
    assert idles(emulator, session_id)[-1] == {"type": "end_turn"}


async def test_a_custom_call_waits_for_its_owner(emulator: Emulator, driven: Any) -> None:
    session_id = start(emulator, call("bash", command="a"), custom("ticket", number=7))
    (ticket,) = emulator.events(session_id, "agent.custom_tool_use")
    task = await driven(emulator, session_id)
    await asyncio.to_thread(emulator.wait_until, lambda: emulator.pending_calls(session_id) == [ticket["id"]])
    assert idles(emulator, session_id)[-1] == {"type": "requires_action", "event_ids": [ticket["id"]]}
    emulator.send(session_id, custom_result(ticket["id"], "ticket 7 is open"))
    calls = await task

    assert [each.name for each in calls if each.posted] == ["bash"]
    assert len(emulator.events(session_id, "user.custom_tool_result")) == 1
    assert said(emulator, session_id) == "ran a\nticket 7 is open"


@beta_async_tool
async def ticket(number: int) -> str:
    """Look a ticket up."""
    return f"ticket {number} is open"


async def test_a_runner_serves_the_custom_tools_it_owns(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = start(emulator, custom("ticket", number=7))
    runner = owner.beta.sessions.events.tool_runner(session_id, tools=[ticket], max_idle=0.05)
    assert [each.posted async for each in runner] == [True]
    (posted,) = emulator.events(session_id, "user.custom_tool_result")
    assert posted["content"] == [{"type": "text", "text": "ticket 7 is open"}]
    assert said(emulator, session_id) == "ticket 7 is open"
    assert "session-tool-runner" in {record.helper for record in emulator.requests}


async def test_an_interrupt_drops_a_held_call(emulator: Emulator, driven: Any) -> None:
    session_id = start(emulator, call("bash", permission="ask", command="a"))
    task = await driven(emulator, session_id)
    emulator.send(session_id, {"type": "user.interrupt"})
    assert types_of(emulator.events(session_id))[-3:] == [
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    assert idles(emulator, session_id)[-1] == {"type": "end_turn"}
    assert not task.done()  # the runner holds the call still: nobody has told it that the verdict will not come
    assert executed == []
