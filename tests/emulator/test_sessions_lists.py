"""Lists of sessions and the limits of their metadata."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from anthropic import AsyncAnthropic, BadRequestError

from tools.emulator import Emulator, call, end, sleep, tools


async def listed(owner: AsyncAnthropic, **params: Any) -> list[str]:
    return [session.id async for session in owner.beta.sessions.list(**params)]


async def test_filters_of_sessions(emulator: Emulator, owner: AsyncAnthropic) -> None:
    store_id = emulator.add_memory_store("s", {})
    plain = emulator.create_session()
    emulator.advance(60)
    with_store = emulator.create_session(resources=[store_id])
    emulator.advance(60)
    with_skill = emulator.create_session(skills=[emulator.add_skill("k", {"SKILL.md": ""})])
    agent_id = emulator.session(with_skill)["agent"]["id"]
    first, second, _ = (emulator.session(each)["created_at"] for each in (plain, with_store, with_skill))

    assert await listed(owner) == [with_skill, with_store, plain]
    assert await listed(owner, order="asc", limit=1) == [plain, with_store, with_skill]
    assert await listed(owner, memory_store_id=store_id) == [with_store]
    assert await listed(owner, agent_id=agent_id) == [with_skill]
    assert await listed(owner, agent_id=agent_id, agent_version=2) == []
    assert await listed(owner, agent_version=2) == [with_skill, with_store, plain]
    assert await listed(owner, created_at_gt=second) == [with_skill]
    assert await listed(owner, created_at_gte=second) == [with_skill, with_store]
    assert await listed(owner, created_at_lt=second) == [plain]
    assert await listed(owner, created_at_lte=second, created_at_gt=first) == [with_store]
    later = emulator.now() + timedelta(days=1)
    assert await listed(owner, created_at_gte=later) == []


async def test_sessions_by_status(emulator: Emulator, owner: AsyncAnthropic) -> None:
    idle = emulator.create_session()
    running = emulator.create_session()
    emulator.set_script(running, [sleep(60), end()])
    emulator.say(running, "go")
    ended = emulator.create_session()
    emulator.archive_session(ended)
    assert await listed(owner, statuses=["running"]) == [running]
    assert await listed(owner, statuses=["idle", "running"]) == [running, idle]
    assert await listed(owner, statuses=["terminated"]) == []
    assert await listed(owner, statuses=["terminated"], include_archived=True) == [ended]


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({str(number): "" for number in range(17)}, "metadata: "),
        ({"k" * 65: ""}, r"metadata\."),
        ({"": ""}, r"metadata\."),
        ({"k": "v" * 513}, "metadata.k: "),
    ],
)
async def test_metadata_has_limits(
    emulator: Emulator, owner: AsyncAnthropic, metadata: dict[str, str], complaint: str
) -> None:
    with pytest.raises(BadRequestError, match=complaint):
        await owner.beta.sessions.create(
            agent=emulator.agent_id, environment_id=emulator.environment_id, metadata=metadata
        )
    assert await listed(owner) == []
    session_id = emulator.create_session(metadata={"kept": "1"})
    with pytest.raises(BadRequestError, match=complaint):
        await owner.beta.sessions.update(session_id, metadata=dict(metadata), title="new")
    session = emulator.session(session_id)
    assert (session["metadata"], session["title"]) == ({"kept": "1"}, None)


async def test_a_patch_may_make_room_for_itself(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session(metadata={str(number): "" for number in range(16)})
    with pytest.raises(BadRequestError, match="metadata: 17 keys, and at most 16"):
        await owner.beta.sessions.update(session_id, metadata={"new": "1"})
    updated = await owner.beta.sessions.update(session_id, metadata={"new": "1", "0": None})
    assert (len(updated.metadata), updated.metadata["new"]) == (16, "1")


async def test_what_happens_to_an_archived_session(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.set_script(session_id, [tools(call("bash", command="x")), end()])
    emulator.say(session_id, "go")
    archived = await owner.beta.sessions.archive(session_id)
    assert (await owner.beta.sessions.archive(session_id)).archived_at == archived.archived_at
    assert emulator.pending_calls(session_id) == []
    with pytest.raises(BadRequestError, match="is terminated"):
        await owner.beta.sessions.events.send(session_id, events=[{"type": "user.interrupt"}])
    assert (await owner.beta.sessions.retrieve(session_id)).status == "terminated"
    newest = await owner.beta.sessions.events.list(session_id, order="desc", limit=1)
    assert [event.type for event in newest.data] == ["session.status_terminated"]
