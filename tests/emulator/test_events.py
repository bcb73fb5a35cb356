"""Sessions and their events over HTTP: history by pages and filters, the live stream, the objects around them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from anthropic import APIStatusError, AsyncAnthropic

from tests.emulator.support import at, bearer, error_of
from tools.emulator import Emulator, sleep, streams


def hello(text: str = "hello") -> Any:
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


async def test_a_session_with_the_sdk(emulator: Emulator, owner: AsyncAnthropic) -> None:
    agent = await owner.beta.agents.create(name="mine", model="claude-opus-5-5", system="Be brief.")
    session = await owner.beta.sessions.create(
        agent={"type": "agent", "id": agent.id, "version": 1},
        environment_id=emulator.environment_id,
        title="first",
        metadata={"a": "1"},
        initial_events=[hello()],
    )
    assert (session.status, session.title, session.agent.name, session.agent.system) == (
        "idle",
        "first",
        "mine",
        "Be brief.",
    )
    assert emulator.work(session.id)["state"] == "queued"
    assert emulator.events(session.id, "agent.message")

    updated = await owner.beta.sessions.update(session.id, title="second", metadata={"a": None, "b": "2"})
    assert (updated.title, updated.metadata) == ("second", {"b": "2"})
    (event,) = emulator.events(session.id, "session.updated")
    assert (event["title"], event["metadata"]) == ("second", {"b": "2"})

    other = emulator.create_session()
    assert [one.id async for one in owner.beta.sessions.list(limit=1)] == [other, session.id]
    archived = await owner.beta.sessions.archive(session.id)
    assert archived.status == "terminated"
    assert archived.archived_at is not None
    assert [one.id async for one in owner.beta.sessions.list()] == [other]
    await owner.beta.sessions.delete(session.id)
    with pytest.raises(APIStatusError) as refusal:
        await owner.beta.sessions.retrieve(session.id)
    assert refusal.value.status_code == 404


async def test_environments_with_the_sdk(emulator: Emulator, owner: AsyncAnthropic) -> None:
    environment = await owner.beta.environments.create(name="lab", config={"type": "self_hosted"})
    assert (await owner.beta.environments.retrieve(environment.id)).config.type == "self_hosted"
    renamed = await owner.beta.environments.update(environment.id, name="laboratory")
    assert renamed.name == "laboratory"
    assert [one.id async for one in owner.beta.environments.list()] == [environment.id, emulator.environment_id]
    await owner.beta.environments.archive(environment.id)
    assert [one.id async for one in owner.beta.environments.list()] == [emulator.environment_id]
    with pytest.raises(APIStatusError) as refusal:
        await owner.beta.environments.update(environment.id, name="attic")
    assert (refusal.value.status_code, refusal.value.error_code) == (400, "environment_archived")


async def test_agents_with_the_sdk(emulator: Emulator, owner: AsyncAnthropic) -> None:
    agent = await owner.beta.agents.create(
        name="mine", model={"id": "claude-opus-5-5"}, tools=[{"type": "agent_toolset_20260401"}]
    )
    assert (await owner.beta.agents.retrieve(agent.id)).tools == agent.tools
    assert agent.tools[0].to_dict() == {
        "type": "agent_toolset_20260401",
        "configs": [],
        "default_config": {"enabled": True, "permission_policy": {"type": "always_allow"}},
    }
    assert [one.id async for one in owner.beta.agents.list()] == [agent.id, emulator.agent_id]


# History


async def test_pages_and_order(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "one")
    emulator.say(session_id, "!wait")
    emulator.say(session_id, "later")  # still unprocessed: it comes last
    ids = [event["id"] for event in emulator.events(session_id)]
    events = owner.beta.sessions.events
    assert [event.id async for event in events.list(session_id, limit=4)] == ids
    assert [event.id async for event in events.list(session_id, limit=7, order="desc")] == ids[::-1]


async def test_pages_stay_put_while_the_log_grows(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "one")
    first = await owner.beta.sessions.events.list(session_id, limit=3, order="desc")
    before = [event["id"] for event in emulator.events(session_id)][::-1]
    emulator.say(session_id, "two")
    second = await first.get_next_page()
    assert [event.id for event in [*first.data, *second.data]] == before[:6]


async def test_filters(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "one")
    emulator.say(session_id, "two")
    events = owner.beta.sessions.events
    messages = [event async for event in events.list(session_id, types=["user.message", "agent.message"])]
    assert [event.type for event in messages] == ["user.message", "agent.message"] * 2
    moment = at(emulator.events(session_id, "user.message")[1]["processed_at"])
    after = [event async for event in events.list(session_id, created_at_gt=moment, types=["user.message"])]
    since = [event async for event in events.list(session_id, created_at_gte=moment, types=["user.message"])]
    before = [event async for event in events.list(session_id, created_at_lt=moment, types=["user.message"])]
    until = [event async for event in events.list(session_id, created_at_lte=moment, types=["user.message"])]
    assert [len(found) for found in (after, since, before, until)] == [0, 1, 1, 2]


# Stream


async def test_the_stream_is_live_only_and_shows_a_message_twice(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "before")
    seen: list[Any] = []
    async with await owner.beta.sessions.events.stream(session_id) as stream:
        emulator.say(session_id, "after")
        async for event in stream:
            seen.append(event)
            if event.type == "session.status_idle":
                break
    messages = [event for event in seen if event.type == "user.message"]
    assert len(messages) == 2
    assert messages[0].id == messages[1].id
    assert (messages[0].processed_at is None, messages[1].processed_at is None) == (True, False)
    logged = [event["id"] for event in emulator.events(session_id)]
    assert [event.id for event in seen[1:]] == logged[-len(seen) + 1 :]


async def test_a_deleted_session_ends_its_streams(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    async with await owner.beta.sessions.events.stream(session_id) as stream:
        emulator.delete_session(session_id)
        assert [event.type async for event in stream] == ["session.deleted"]


async def test_stopping_the_emulator_ends_its_streams(owner: AsyncAnthropic, emulator: Emulator) -> None:
    session_id = emulator.create_session()
    async with await owner.beta.sessions.events.stream(session_id) as stream:
        await asyncio.to_thread(emulator.stop)
        assert [event async for event in stream] == []


def test_a_quiet_stream_is_kept_alive(emulator: Emulator, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.01)
    session_id = emulator.create_session()
    path = f"/v1/sessions/{session_id}/events/stream"
    with http.stream("GET", path, headers=bearer(emulator.api_key)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert next(response.iter_lines()) == "event: ping"


# Refusals


async def test_a_self_hosted_session_takes_no_files(emulator: Emulator, owner: AsyncAnthropic) -> None:
    with pytest.raises(APIStatusError) as refusal:
        await owner.beta.sessions.create(
            agent=emulator.agent_id,
            environment_id=emulator.environment_id,
            resources=[{"type": "file", "file_id": "file_1"}],
        )
    assert refusal.value.status_code == 400
    message = refusal.value.api_message
    assert message is not None
    assert emulator.environment_id in message
    assert "resources are not supported" in message


def test_sessions_need_the_beta_header(emulator: Emulator) -> None:
    with httpx2.Client(base_url=emulator.url, headers=bearer(emulator.api_key)) as http:
        assert http.get(f"/v1/sessions/{emulator.create_session()}").status_code == 404


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        ({"type": "user.message", "content": []}, "events.0.user.message.content"),
        ({"type": "user.message", "content": [{"type": "text", "text": ""}]}, "content.0.text.text"),
        ({"type": "user.message", "content": [{"type": "text", "text": "x"}], "extra": 1}, "extra"),
        ({"type": "user.shout"}, "user.shout"),
        ({"type": "user.tool_result", "tool_use_id": "sevt_1"}, "sevt_1"),
        (
            {"type": "user.tool_confirmation", "tool_use_id": "a", "result": "allow", "deny_message": "b"},
            "deny_message",
        ),
    ],
)
def test_a_bad_event_is_named(emulator: Emulator, http: httpx2.Client, event: Any, complaint: str) -> None:
    path = f"/v1/sessions/{emulator.create_session()}/events"
    response = http.post(path, json={"events": [event]}, headers=bearer(emulator.api_key))
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert complaint in error_of(response)["message"]


# Time


def test_the_date_header_is_the_emulators(emulator: Emulator, http: httpx2.Client) -> None:
    from email.utils import parsedate_to_datetime

    emulator.advance(86_400)
    response = http.get("/v1/agents", headers=bearer(emulator.api_key))
    assert response.headers.get_list("date") == [response.headers["date"]]
    assert abs(parsedate_to_datetime(response.headers["date"]) - emulator.now()) < timedelta(seconds=5)


def test_a_running_session_says_so(emulator: Emulator, http: httpx2.Client) -> None:
    session_id = emulator.create_session()
    emulator.set_script(session_id, [sleep(60)])
    emulator.say(session_id, "go")
    emulator.advance(10)
    session = http.get(f"/v1/sessions/{session_id}", headers=bearer(emulator.api_key)).json()
    assert session["status"] == "running"
    assert 10 <= session["stats"]["active_seconds"] < 15
