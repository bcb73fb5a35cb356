"""Sub-agents: their threads, what the primary stream shows of them, and what a terminated one takes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from anthropic import AsyncAnthropic, BadRequestError, NotFoundError, beta_async_tool

from tests.emulator.support import MakeWorker, bearer, error_of, idles, result, serving, types_of
from tools.emulator import Emulator, Step, call, delegate, end, error, repeat_output, say, sleep, tools
from tools.emulator.agents import Permission
from tools.emulator.errors import Invalid


def start(emulator: Emulator, *steps: Step, permission: Permission = "allow") -> str:
    """A session whose agent has `steps` done by a researcher, or one call of bash, and repeats the answer."""
    session_id = emulator.create_session()
    work = steps or (tools(call("bash", command="echo found", permission=permission)), repeat_output)
    emulator.set_script(session_id, [delegate("researcher", "Find it.", *work), repeat_output, end()])
    emulator.say(session_id, "go")
    return session_id


def thread_of(emulator: Emulator, session_id: str) -> str:
    (created,) = emulator.events(session_id, "session.thread_created")
    thread_id: str = created["session_thread_id"]
    return thread_id


def archive(emulator: Emulator, session_id: str) -> httpx2.Response:
    path = f"{emulator.url}/v1/sessions/{session_id}/threads/{thread_of(emulator, session_id)}/archive"
    headers = {"anthropic-beta": "managed-agents-2026-04-01"}
    return httpx2.post(path, headers=headers | bearer(emulator.api_key))


async def test_the_worker_serves_a_sub_agent(
    emulator: Emulator, make_worker: MakeWorker, owner: AsyncAnthropic
) -> None:
    session_id = start(emulator)
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_idle, session_id)
    thread_id = thread_of(emulator, session_id)

    assert types_of(emulator.events(session_id)) == [
        "session.status_running",
        "session.thread_status_running",
        "user.message",
        "span.model_request_start",
        "session.thread_created",
        "agent.thread_message_sent",
        "span.model_request_end",
        "session.thread_status_running",
        "agent.tool_use",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
        "user.tool_result",
        "session.status_running",
        "session.thread_status_running",
        "agent.thread_message_received",
        "session.thread_status_idle",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    own = [event async for event in owner.beta.sessions.threads.events.list(thread_id, session_id=session_id)]
    assert [event.type for event in own] == [
        "agent.thread_message_received",
        "session.thread_status_running",
        "span.model_request_start",
        "agent.tool_use",
        "span.model_request_end",
        "session.thread_status_idle",
        "user.tool_result",
        "session.thread_status_running",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        "agent.thread_message_sent",
        "session.thread_status_idle",
    ]
    (shown,) = emulator.events(session_id, "agent.tool_use")
    (answered,) = emulator.events(session_id, "user.tool_result")
    assert shown["session_thread_id"] == answered["session_thread_id"] == thread_id
    assert [event.session_thread_id for event in own if event.type == "agent.tool_use"] == [None]
    assert [event.id for event in own if event.type == "agent.tool_use"] == [shown["id"]]
    assert emulator.events(session_id, "agent.message")[-1]["content"][0]["text"] == "found"


async def test_threads_are_listed_and_read(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = start(emulator)
    threads = owner.beta.sessions.threads
    primary, child = [thread async for thread in threads.list(session_id)]
    assert (primary.parent_thread_id, child.parent_thread_id) == (None, primary.id)
    assert (child.id, child.agent.type, child.status) == (thread_of(emulator, session_id), "agent", "idle")
    assert child.agent.type == "agent"
    assert child.agent.name == "researcher"
    assert [thread.id async for thread in threads.list(session_id, statuses=["running"])] == []
    assert (await threads.retrieve(child.id, session_id=session_id)).id == child.id
    (call_id,) = emulator.pending_calls(session_id)
    emulator.send(session_id, result(call_id))
    assert (await threads.retrieve(child.id, session_id=session_id)).status == "idle"
    whole = [event.id async for event in threads.events.list(primary.id, session_id=session_id, limit=3)]
    assert whole == [event["id"] for event in emulator.events(session_id)]
    with pytest.raises(NotFoundError, match="has no thread sthr_gone"):
        await threads.retrieve("sthr_gone", session_id=session_id)


async def test_a_thread_streams_its_own_events(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = start(emulator, sleep(5), say("found"))
    thread_id = thread_of(emulator, session_id)
    async with await owner.beta.sessions.threads.events.stream(thread_id, session_id=session_id) as stream:
        emulator.advance(6)
        seen: list[str] = []
        async for event in stream:
            seen.append(event.type)
            if event.type == "session.thread_status_idle":
                break
    assert seen == [
        "agent.message",
        "span.model_request_end",
        "agent.thread_message_sent",
        "session.thread_status_idle",
    ]


async def test_the_runner_posts_nothing_for_a_terminated_thread(emulator: Emulator, owner: AsyncAnthropic) -> None:
    """The thread ends while its tool runs: the runner hears of it and keeps the result."""
    session_id = start(emulator)

    @beta_async_tool
    async def bash(command: str) -> str:
        """Outlive the thread."""
        response = await asyncio.to_thread(archive, emulator, session_id)
        assert response.json()["status"] == "terminated"
        thread_id = thread_of(emulator, session_id)
        while thread_id not in runner._terminated_threads:  # noqa: ASYNC110 - the SDK tells nobody when it hears
            await asyncio.sleep(0.001)
        return command

    runner = owner.beta.sessions.events.tool_runner(session_id, tools=[bash], max_idle=0.05)
    assert [each.posted async for each in runner] == [False]
    assert "events.send" not in {record.operation for record in emulator.requests}
    assert emulator.events(session_id, "agent.message")[-1]["content"][0]["text"] == "Error: The thread was archived."


async def test_a_held_call_goes_with_its_thread(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = start(emulator, permission="ask")
    (call_id,) = emulator.pending_calls(session_id)
    await asyncio.to_thread(archive, emulator, session_id)

    @beta_async_tool
    async def bash(command: str) -> str:
        """Never run."""
        raise AssertionError(command)

    runner = owner.beta.sessions.events.tool_runner(session_id, tools=[bash], max_idle=0.05)
    assert [each async for each in runner] == []
    assert idles(emulator, session_id)[-1] == {"type": "end_turn"}
    with pytest.raises(Invalid, match="does not wait for a confirmation"):
        emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": "allow"})


def test_a_terminated_thread_takes_no_result(emulator: Emulator) -> None:
    session_id = start(emulator)
    (call_id,) = emulator.pending_calls(session_id)
    first = archive(emulator, session_id).json()
    with pytest.raises(Invalid, match="is not an open call"):
        emulator.send(session_id, result(call_id))
    (terminated,) = emulator.events(session_id, "session.thread_status_terminated")
    assert terminated["session_thread_id"] == first["id"]
    assert first["archived_at"] == archive(emulator, session_id).json()["archived_at"]
    assert len(emulator.events(session_id, "session.thread_status_terminated")) == 1
    with pytest.raises(Invalid, match="is terminated"):
        emulator.send(session_id, {"type": "user.interrupt", "session_thread_id": first["id"]})


def test_a_finished_thread_can_be_archived(emulator: Emulator) -> None:
    session_id = start(emulator, say("found"))
    before = idles(emulator, session_id)
    assert archive(emulator, session_id).json()["status"] == "terminated"
    assert types_of(emulator.events(session_id))[-1] == "session.thread_status_terminated"
    assert idles(emulator, session_id) == before


def test_the_primary_thread_is_not_archived(emulator: Emulator, http: httpx2.Client) -> None:
    session_id = start(emulator)
    primary = emulator.events(session_id, "session.thread_status_running")[0]["session_thread_id"]
    path = f"/v1/sessions/{session_id}/threads/{primary}/archive"
    response = http.post(path, headers=bearer(emulator.api_key))
    assert response.status_code == 400
    assert error_of(response)["message"].endswith("archive the session")


@pytest.mark.parametrize("named", [True, False])
def test_an_interrupt_of_one_thread_or_of_all(emulator: Emulator, named: bool) -> None:
    session_id = start(emulator)
    (call_id,) = emulator.pending_calls(session_id)
    thread_id = thread_of(emulator, session_id)
    interrupt: dict[str, Any] = {"type": "user.interrupt"}
    emulator.send(session_id, interrupt | ({"session_thread_id": thread_id} if named else {}))

    messages = [event["content"][0]["text"] for event in emulator.events(session_id, "agent.message")]
    assert messages == (["Error: The sub-agent was interrupted."] if named else [])
    assert idles(emulator, session_id)[-1] == {"type": "end_turn"}
    ends = emulator.events(session_id, "session.thread_status_idle")
    assert [each["agent_name"] for each in ends][-2:] == ["researcher", "emulator"]
    emulator.send(session_id, result(call_id))  # late, and kept
    assert emulator.events(session_id, "user.tool_result")[0]["session_thread_id"] == thread_id


def test_a_sub_agent_that_fails_or_denies(emulator: Emulator) -> None:
    session_id = start(emulator, error("No luck."))
    assert emulator.events(session_id, "session.error")[0]["session_thread_id"] == thread_of(emulator, session_id)
    assert idles(emulator, session_id) == [{"type": "end_turn"}]
    session_id = start(emulator, permission="ask")
    (call_id,) = emulator.pending_calls(session_id)
    denial = {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": "deny", "deny_message": "No."}
    emulator.send(session_id, denial)
    assert emulator.events(session_id, "agent.message")[-1]["content"][0]["text"] == "Error: No."


def test_usage_counts_each_thread(emulator: Emulator, http: httpx2.Client) -> None:
    session_id = start(emulator, sleep(10), say("found"))
    emulator.advance(10)
    path = f"/v1/sessions/{session_id}/threads"
    primary, child = http.get(path, headers=bearer(emulator.api_key)).json()["data"]
    assert child["usage"]["input_tokens"] == 100
    assert primary["usage"]["input_tokens"] == 300  # the call, the sub-agent's request and the answer
    assert 10 <= child["stats"]["active_seconds"] < 15


async def test_archiving_refuses_what_it_does_not_know(owner: AsyncAnthropic, emulator: Emulator) -> None:
    session_id = start(emulator)
    with pytest.raises(BadRequestError, match="reason: not a body field"):
        await owner.beta.sessions.threads.archive(
            thread_of(emulator, session_id), session_id=session_id, extra_body={"reason": "x"}
        )
