"""The rules of memory stores: views, paths, preconditions, and what a session keeps of them."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx2
import pytest
from anthropic import AsyncAnthropic, BadRequestError, ConflictError, NotFoundError

from tests.emulator.support import bearer, error_of
from tools.emulator import Emulator

NOTES = {"/notes.md": "first\n", "/deep/er/old.md": "old\n", "/keep.md": "kept\n"}


@pytest.fixture
def store_id(emulator: Emulator) -> str:
    return emulator.add_memory_store("User Preferences!", NOTES)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def test_views(owner: AsyncAnthropic, store_id: str) -> None:
    memories = owner.beta.memory_stores.memories
    basic = [item async for item in memories.list(store_id)]
    full = [item async for item in memories.list(store_id, view="full")]
    assert [item.path for item in basic] == sorted(NOTES)
    assert all(item.type == "memory" and item.content is None for item in basic)
    assert {item.path: item.content for item in full if item.type == "memory"} == NOTES
    for item in basic:
        assert item.type == "memory"
        assert item.content_sha256 == sha(NOTES[item.path])
        assert item.content_size_bytes == len(NOTES[item.path])
        assert (await memories.retrieve(item.id, memory_store_id=store_id)).content == NOTES[item.path]
        assert (await memories.retrieve(item.id, memory_store_id=store_id, view="basic")).content is None


async def test_prefix_depth_and_pages(owner: AsyncAnthropic, store_id: str) -> None:
    memories = owner.beta.memory_stores.memories

    async def listed(**params: Any) -> list[str]:
        return [f"{item.type} {item.path}" async for item in memories.list(store_id, **params)]

    assert await listed(depth=1) == ["memory_prefix /deep/", "memory /keep.md", "memory /notes.md"]
    assert await listed(depth=2) == ["memory_prefix /deep/er/", "memory /keep.md", "memory /notes.md"]
    assert await listed(path_prefix="/deep/") == ["memory /deep/er/old.md"]
    assert await listed(path_prefix="/de/") == []
    assert await listed(limit=1, depth=1) == await listed(depth=1)
    with pytest.raises(BadRequestError, match="path_prefix: must start and end"):
        await listed(path_prefix="/deep")
    with pytest.raises(BadRequestError, match="limit: "):
        await listed(limit=101)
    with pytest.raises(BadRequestError, match="page: not a cursor"):
        await listed(page="/gone")


async def test_a_full_page_is_smaller(owner: AsyncAnthropic, emulator: Emulator) -> None:
    store_id = emulator.add_memory_store("many", {f"/{number}": "" for number in range(21)})
    memories = owner.beta.memory_stores.memories
    assert len((await memories.list(store_id, limit=100)).data) == 21
    page = await memories.list(store_id, limit=100, view="full")
    assert (len(page.data), page.has_next_page()) == (20, True)


async def test_preconditions(owner: AsyncAnthropic, emulator: Emulator, store_id: str) -> None:
    memories = owner.beta.memory_stores.memories
    item = await memories.create(store_id, path="/a.md", content="one", view="full")
    assert item.content == "one"
    with pytest.raises(ConflictError, match="not the expected"):
        await memories.update(
            item.id,
            memory_store_id=store_id,
            content="two",
            path="/b.md",
            precondition={"type": "content_sha256", "content_sha256": sha("other")},
        )
    with pytest.raises(ConflictError, match="not the expected"):
        await memories.delete(item.id, memory_store_id=store_id, expected_content_sha256=sha("other"))
    assert emulator.memories(store_id)["/a.md"] == "one"

    changed = await memories.update(
        item.id,
        memory_store_id=store_id,
        content="two",
        path="/b.md",
        precondition={"type": "content_sha256", "content_sha256": item.content_sha256},
    )
    assert (changed.id, changed.path, changed.content_sha256) == (item.id, "/b.md", sha("two"))
    assert changed.memory_version_id != item.memory_version_id
    deleted = await memories.delete(item.id, memory_store_id=store_id, expected_content_sha256=sha("two"))
    assert (deleted.id, deleted.type) == (item.id, "memory_deleted")
    with pytest.raises(NotFoundError):
        await memories.retrieve(item.id, memory_store_id=store_id)


async def test_the_sdk_repeats_a_conflict_twice(emulator: Emulator, store_id: str) -> None:
    """The core client retries 409, so one lost precondition is three requests."""
    async with AsyncAnthropic(base_url=emulator.url, auth_token=emulator.api_key) as client:
        with pytest.raises(ConflictError):
            await client.beta.memory_stores.memories.create(store_id, path="/notes.md", content="taken")
    assert [record.status for record in emulator.requests] == [409, 409, 409]
    assert emulator.memories(store_id) == NOTES


@pytest.mark.parametrize(
    "path",
    ["a.md", "/", "/a//b", "/a/", "/../a", "/a/./b", "/" + "x" * 1024, "/a" * 21, "/a\tb", "/a\u200bb", "/e\u0301"],
)
async def test_paths_that_are_none(owner: AsyncAnthropic, store_id: str, path: str) -> None:
    with pytest.raises(BadRequestError, match="path: "):
        await owner.beta.memory_stores.memories.create(store_id, path=path, content="")


async def test_the_largest_memory(owner: AsyncAnthropic, store_id: str) -> None:
    memories = owner.beta.memory_stores.memories
    await memories.create(store_id, path="/large", content="é" * 51_200)
    with pytest.raises(BadRequestError, match="content: more than 102400 bytes"):
        await memories.create(store_id, path="/larger", content="é" * 51_200 + "x")


async def test_the_life_of_a_store(owner: AsyncAnthropic, emulator: Emulator) -> None:
    stores = owner.beta.memory_stores
    store = await stores.create(name="A", description="about", metadata={"k": "v"})
    changed = await stores.update(store.id, name="B", metadata={"k": None, "l": "w"})
    assert (changed.name, changed.description, changed.metadata) == ("B", "about", {"l": "w"})
    memory = await stores.memories.create(store.id, path="/a", content="a")
    assert (await stores.archive(store.id)).archived_at is not None
    for attempt in (
        stores.memories.create(store.id, path="/b", content="b"),
        stores.memories.update(memory.id, memory_store_id=store.id, content="b"),
        stores.update(store.id, name="C"),
    ):
        with pytest.raises(BadRequestError, match="is archived"):
            await attempt
    assert [each.id async for each in stores.list()] == []
    assert [each.id async for each in stores.list(include_archived=True)] == [store.id]
    assert (await stores.memories.retrieve(memory.id, memory_store_id=store.id)).content == "a"
    await stores.memories.delete(memory.id, memory_store_id=store.id)
    assert (await stores.delete(store.id)).type == "memory_store_deleted"
    with pytest.raises(NotFoundError):
        await stores.retrieve(store.id)


async def test_a_session_keeps_its_stores_as_they_were(owner: AsyncAnthropic, emulator: Emulator) -> None:
    stores = owner.beta.memory_stores
    ids = [(await stores.create(name=name, description=f"d {name}")).id for name in ("My  Notes", "my-notes", "Ünï")]
    session = await owner.beta.sessions.create(
        agent=emulator.agent_id,
        environment_id=emulator.environment_id,
        resources=[
            {"type": "memory_store", "memory_store_id": ids[0], "access": "read_only", "instructions": "look"},
            {"type": "memory_store", "memory_store_id": ids[1]},
            {"type": "memory_store", "memory_store_id": ids[2]},
        ],
    )
    await stores.update(ids[0], name="Renamed")
    kept = (await owner.beta.sessions.retrieve(session.id)).resources
    assert kept == session.resources == [each async for each in owner.beta.sessions.resources.list(session.id)]
    assert kept[0].to_dict() == {
        "type": "memory_store",
        "memory_store_id": ids[0],
        "access": "read_only",
        "mount_path": "/mnt/memory/my-notes",
        "name": "My  Notes",
        "description": "d My  Notes",
        "instructions": "look",
    }
    paths = [each.mount_path for each in kept if each.type == "memory_store"]
    assert paths == ["/mnt/memory/my-notes", "/mnt/memory/my-notes-2", "/mnt/memory/n"]


@pytest.mark.parametrize(
    ("resources", "complaint"),
    [
        ([{"type": "file", "file_id": "file_1"}], "environment {env} is self_hosted: resources are not supported"),
        ([{"type": "github_repository", "url": "u"}], "environment {env} is self_hosted: resources are not supported"),
        ([{"type": "bucket"}], "resources.0: "),
        ([{"type": "memory_store"}], "resources.0.memory_store.memory_store_id: Field required"),
        ([{"type": "memory_store", "memory_store_id": "{id}", "mount_path": "/x"}], "resources.0.memory_store.mount_"),
        ([{"type": "memory_store", "memory_store_id": "{id}"}] * 2, "resources: memory store {id} is attached twice"),
        ([{"type": "memory_store", "memory_store_id": "{id}"}] * 9, "resources: at most 8 memory stores"),
    ],
)
def test_resources_a_session_refuses(
    emulator: Emulator, http: httpx2.Client, store_id: str, resources: list[dict[str, str]], complaint: str
) -> None:
    wanted = [{key: value.replace("{id}", store_id) for key, value in each.items()} for each in resources]
    body = {"agent": emulator.agent_id, "environment_id": emulator.environment_id, "resources": wanted}
    response = http.post("/v1/sessions", json=body, headers=bearer(emulator.api_key))
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(complaint.format(env=emulator.environment_id, id=store_id))
    assert emulator.stats()["depth"] == 0


def test_an_archived_or_unknown_store_is_not_attached(emulator: Emulator, http: httpx2.Client, store_id: str) -> None:
    headers = bearer(emulator.api_key)
    http.post(f"/v1/memory_stores/{store_id}/archive", headers=headers)
    for wanted, status in ((store_id, 400), ("memstore_gone", 404)):
        body = {
            "agent": emulator.agent_id,
            "environment_id": emulator.environment_id,
            "resources": [{"type": "memory_store", "memory_store_id": wanted}],
        }
        assert http.post("/v1/sessions", json=body, headers=headers).status_code == status


def test_files_are_not_added_to_a_session_either(emulator: Emulator, http: httpx2.Client) -> None:
    path = f"/v1/sessions/{emulator.create_session()}/resources"
    response = http.post(path, json={"type": "file", "file_id": "file_1"}, headers=bearer(emulator.api_key))
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(f"environment {emulator.environment_id} is self_hosted")


@pytest.mark.parametrize("beta", ["agent-memory-2026-07-22", "managed-agents-2026-04-01", "x, agent-memory-2026-07-22"])
def test_memory_needs_one_of_two_betas(emulator: Emulator, store_id: str, beta: str) -> None:
    headers = bearer(emulator.api_key)
    path = f"/v1/memory_stores/{store_id}/memories"
    with httpx2.Client(base_url=emulator.url, headers=headers) as http:
        assert http.get(path).status_code == 404
        assert http.get(path, headers={"anthropic-beta": beta}).status_code == 200
