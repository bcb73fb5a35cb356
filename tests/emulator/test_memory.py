"""Memory stores: mounted, edited and synced by the SDK's worker, and the rules behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic, PermissionDeniedError

from tests.emulator.support import MakeWorker, claim, client_of, serving, token_of, worker_for
from tools.emulator import Call, Emulator, Switches, call, end, repeat_output, tools

NOTES = {"/notes.md": "first\n", "/deep/er/old.md": "old\n", "/keep.md": "kept\n"}


@pytest.fixture
def root(emulator: Emulator, tmp_path: Path) -> Path:
    emulator.memory_root = str(tmp_path / "mnt")
    return tmp_path / "mnt"


@pytest.fixture
def store_id(emulator: Emulator) -> str:
    return emulator.add_memory_store("User Preferences!", NOTES)


def run(emulator: Emulator, session_id: str, *calls: Call) -> None:
    steps: list[Any] = []
    for each in calls:
        steps += [tools(each), repeat_output]
    emulator.set_script(session_id, [*steps, end()])
    emulator.say(session_id, "go")


def said(emulator: Emulator, session_id: str) -> list[str]:
    return [event["content"][0]["text"] for event in emulator.events(session_id, "agent.message")]


def operations(emulator: Emulator, *names: str) -> list[int]:
    """The statuses of these operations, in order."""
    return [record.status for record in emulator.requests if record.operation in names]


async def served(emulator: Emulator, session_id: str, make_worker: MakeWorker) -> None:
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "stopped")


async def test_the_worker_mounts_and_syncs_a_store(
    emulator: Emulator, make_worker: MakeWorker, root: Path, store_id: str
) -> None:
    session_id = emulator.create_session(resources=[store_id])
    mount = root / "user-preferences"
    run(
        emulator,
        session_id,
        call("bash", command=f"cat {mount}/notes.md {mount}/deep/er/old.md"),
        call("bash", command=f"cd {mount} && echo more >> notes.md && echo new > fresh.md && rm deep/er/old.md"),
        call("edit", file_path=f"{mount}/keep.md", old_string="kept", new_string="edited"),
    )
    await served(emulator, session_id, make_worker)

    assert said(emulator, session_id)[0] == "first\nold"
    assert emulator.memories(store_id) == {"/notes.md": "first\nmore\n", "/keep.md": "edited\n", "/fresh.md": "new\n"}
    assert not mount.exists()
    asked = [record for record in emulator.requests if record.operation and record.operation.startswith("memories")]
    assert {record.credential for record in asked} == {"sessions_token"}
    assert {record.status for record in asked} == {200}
    assert asked[0].query == {"view": ["full"], "limit": ["20"]}
    changes = sorted(record.operation or "" for record in asked if record.method != "GET")
    assert changes == ["memories.create", "memories.delete", "memories.update", "memories.update"]


async def test_a_read_only_store_is_read_only(emulator: Emulator, make_worker: MakeWorker, root: Path) -> None:
    store_id = emulator.add_memory_store("rules", NOTES, access="read_only")
    session_id = emulator.create_session(resources=[store_id])
    mount = root / "rules"
    write = call("write", file_path=f"{mount}/notes.md", content="mine")
    run(emulator, session_id, write, call("bash", command=f"echo mine > {mount}/notes.md; echo tried"))
    await served(emulator, session_id, make_worker)

    assert "read-only" in said(emulator, session_id)[0]
    assert said(emulator, session_id)[1] == "tried"
    assert emulator.memories(store_id) == NOTES
    assert operations(emulator, "memories.create", "memories.update", "memories.delete") == []


async def test_more_than_a_page_of_memories_is_mounted(emulator: Emulator, make_worker: MakeWorker, root: Path) -> None:
    store_id = emulator.add_memory_store("many", {f"/m{number:03}.md": f"{number}\n" for number in range(45)})
    session_id = emulator.create_session(resources=[store_id])
    run(emulator, session_id, call("bash", command=f"cat {root}/many/*.md | wc -l"))
    await served(emulator, session_id, make_worker)
    assert said(emulator, session_id) == ["45"]
    full = [record for record in emulator.requests if record.query.get("view") == ["full"]]
    assert [bool(record.query.get("page")) for record in full] == [False, True, True]


async def test_a_change_by_another_session_wins(
    emulator: Emulator, make_worker: MakeWorker, root: Path, store_id: str
) -> None:
    session_id = emulator.create_session(resources=[store_id])
    mount = root / "user-preferences"

    def meanwhile(_: object) -> Any:
        emulator.write_memory(store_id, "/notes.md", "theirs\n")
        emulator.write_memory(store_id, "/keep.md", None)
        return end()

    edit = call("bash", command=f"echo mine > {mount}/notes.md")
    emulator.set_script(session_id, [tools(edit), meanwhile])
    emulator.say(session_id, "go")
    await served(emulator, session_id, make_worker)
    assert emulator.memories(store_id) == {"/notes.md": "theirs\n", "/deep/er/old.md": "old\n"}


async def test_without_a_token_a_session_with_a_store_fails(tmp_path: Path) -> None:
    """Documented: the item is stopped, the session stays as it was and nothing tells it."""
    with Emulator(switches=Switches(secret="null")) as emulator:
        emulator.memory_root = str(tmp_path / "mnt")
        session_id = emulator.create_session(resources=[emulator.add_memory_store("s", NOTES)])
        emulator.say(session_id, "!true")
        before = emulator.events(session_id)
        async with client_of(emulator, emulator.api_key) as client, serving(worker_for(emulator, client, tmp_path, 1)):
            await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "stopped")
        assert emulator.events(session_id) == before
        assert operations(emulator, "memories.list") == []


@pytest.fixture
async def token(emulator: Emulator, runner: AsyncAnthropic, root: Path, store_id: str) -> AsyncIterator[AsyncAnthropic]:
    """The SDK with the sessions token of a session that may write one store and read another."""
    rules = emulator.add_memory_store("rules", NOTES, access="read_only")
    emulator.create_session(resources=[store_id, rules])
    item = await claim(runner, emulator.environment_id)
    async with client_of(emulator, token_of(item.secret)) as client:
        yield client


async def test_what_a_token_reaches(emulator: Emulator, token: AsyncAnthropic, store_id: str) -> None:
    session_id = next(record.path.split("/")[-2] for record in emulator.requests if record.operation == "work.ack")
    writable, rules = (each["memory_store_id"] for each in emulator.session(session_id)["resources"])
    other = emulator.add_memory_store("other", NOTES)
    assert writable == store_id
    memories = token.beta.memory_stores.memories
    await memories.create(writable, path="/a.md", content="a")
    (first, *_) = [item async for item in memories.list(rules, view="full")]
    assert first.type == "memory"
    with pytest.raises(PermissionDeniedError, match="read_only"):
        await memories.create(rules, path="/a.md", content="a")
    with pytest.raises(PermissionDeniedError, match="read_only"):
        await memories.delete(first.id, memory_store_id=rules)
    with pytest.raises(PermissionDeniedError, match="is not attached"):
        await memories.retrieve("mem_x", memory_store_id=other)
    with pytest.raises(PermissionDeniedError, match="does not accept a sessions token"):
        await token.beta.memory_stores.list()


async def test_the_environment_key_reaches_no_store(emulator: Emulator, runner: AsyncAnthropic, store_id: str) -> None:
    memories = runner.beta.memory_stores.memories
    for attempt in (
        memories.create(store_id, path="/a.md", content=""),
        memories.retrieve("mem_x", memory_store_id=store_id),
        memories.update("mem_x", memory_store_id=store_id, content=""),
        memories.delete("mem_x", memory_store_id=store_id),
    ):
        with pytest.raises(PermissionDeniedError, match="does not accept an environment key"):
            await attempt
