"""What the host brings into a sandbox (R12): refused skills and input files. No session waits for want of one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
from anthropic import AsyncAnthropic

from shared import staging
from shared.errors import FetchRefused
from shared.fetching import Fetcher
from shared.jobs import Job
from shared.staging import MAX_BYTES, MAX_INPUT_BYTES, Stager
from tests.fakes.memory_provider import MemoryProvider
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import Detour, FakeProvider, count, settings_for
from tests.world import SharedCore, World
from tools.emulator import Emulator, call, end, repeat_output, tools

STAGED = {"SANDBOX_STAGE_FILES": "true"}
SKILL: dict[str, bytes | str] = {"SKILL.md": "Use scripts/hello.\n", "scripts/hello": "#!/bin/sh\necho hello\n"}


class FakeFetcher(Fetcher):
    """An internet of a few files."""

    def __init__(self, **files: bytes) -> None:
        super().__init__()
        self._files = {f"https://files.example/{name}": content for name, content in files.items()}
        self.asked: list[tuple[str, int]] = []

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        self.asked.append((url, max_bytes))
        if url not in self._files:
            raise FetchRefused("its server answered 404")
        if len(self._files[url]) > max_bytes:
            raise FetchRefused(f"it is larger than {max_bytes} bytes")
        return self._files[url]


async def job_of(client: AsyncAnthropic, emulator: Emulator) -> Job:
    item = await client.beta.environments.work.poll(emulator.environment_id, reclaim_older_than_ms=1)
    assert item is not None
    return Job.from_item(item, settings_for(emulator))


# --- skills ----------------------------------------------------------------------------------------------------------


async def test_skills_that_the_token_may_not_read_are_brought(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    emulator.switch(sessions_token_may_read_skills=False)
    emulator.create_session(skills=[emulator.add_skill("pdf", SKILL, "zip")])
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    assert provider.files == [
        {"skills/pdf/SKILL.md": b"Use scripts/hello.\n", "skills/pdf/scripts/hello": b"#!/bin/sh\necho hello\n"}
    ]
    used = {record.credential for record in emulator.requests if record.operation == "skills.content"}
    assert used == {"environment_key"}


async def test_skills_that_the_token_may_read_are_the_runners_own_business(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    emulator.create_session(skills=[emulator.add_skill("pdf", SKILL, "zip")])
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    assert provider.files == [{}]
    assert count(emulator, "skills.content") == 0


async def test_without_the_setting_no_session_is_looked_at(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    emulator.switch(sessions_token_may_read_skills=False)
    emulator.create_session(skills=[emulator.add_skill("pdf", SKILL, "zip")])
    provider = FakeProvider()
    await make_dispatcher(provider).drain()
    assert provider.files == [{}]
    assert count(emulator, "sessions.get") == count(emulator, "skills.version") == 0


async def test_skills_beyond_the_limit_are_not_brought(
    emulator: Emulator, client: AsyncAnthropic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.switch(sessions_token_may_read_skills=False)
    emulator.create_session(skills=[emulator.add_skill("pdf", SKILL, "zip")])
    monkeypatch.setattr(staging, "MAX_BYTES", 30)
    assert await Stager(client).files(await job_of(client, emulator)) == {}
    assert "the skills have more than 30 bytes" in caplog.text


def test_no_link_of_a_skill_is_followed_on_the_host(tmp_path: Path) -> None:
    """The SDK unpacks none; what it unpacks is read with the host's rights."""
    (tmp_path / "skill").mkdir()
    (tmp_path / "skill" / "SKILL.md").write_text("how to")
    (tmp_path / "key").write_text("the host's")
    (tmp_path / "skill" / "link").symlink_to(tmp_path / "key")
    assert staging._read_all(tmp_path / "skill") == {"SKILL.md": b"how to"}


@pytest.fixture
async def make_world(emulator: Emulator, tmp_path: Path) -> AsyncIterator[Callable[[], World]]:
    made: list[World] = []

    def make() -> World:
        made.append(World(emulator, SharedCore(), lambda root, settings: MemoryProvider(root), tmp_path))
        return made[-1]

    yield make
    for world in made:
        await world.close()


async def test_the_agent_finds_them_where_it_finds_its_skills(
    emulator: Emulator, make_world: Callable[[], World]
) -> None:
    """The whole way, with a real runner, whose SDK is refused and skips the skill."""
    emulator.switch(sessions_token_may_read_skills=False)
    session_id = emulator.create_session(skills=[emulator.add_skill("pdf", SKILL, "zip")])
    emulator.set_script(session_id, [tools(call("bash", command="cat skills/pdf/SKILL.md")), repeat_output, end()])
    host = make_world().host(SANDBOX_STAGE_FILES="true")
    assert (await host.ask(session_id, "go")).strip() == "Use scripts/hello."


# --- inputs ----------------------------------------------------------------------------------------------------------


async def test_the_files_that_the_metadata_names_are_brought(emulator: Emulator, client: AsyncAnthropic) -> None:
    emulator.create_session(
        metadata={
            "input:report.csv": "https://files.example/report",
            "input:deep/er/a b.txt": "https://files.example/text",
            "customer": "https://files.example/no-input",
        }
    )
    fetcher = FakeFetcher(report=b"a,b\n", text=b"hello")
    found = await Stager(client, fetcher).files(await job_of(client, emulator))
    assert found == {"inputs/report.csv": b"a,b\n", "inputs/deep/er/a b.txt": b"hello"}


async def test_what_cannot_be_had_is_named_and_the_rest_is_brought(
    emulator: Emulator, client: AsyncAnthropic, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["../up", "/root", "a//b", ".hidden", "a/../b", "x" * 200, "new\nline", "c:\\x"]
    metadata = {f"input:{name}": "https://files.example/a" for name in names}
    metadata |= {"input:gone": "https://files.example/gone?signature=hush", "input:a": "https://files.example/a"}
    session_id = emulator.create_session()
    session = await client.beta.sessions.retrieve(session_id)
    session = session.model_copy(update={"metadata": metadata})
    fetcher = FakeFetcher(a=b"A")
    found = await Stager(client, fetcher)._inputs(await job_of(client, emulator), session, MAX_BYTES)
    assert {path: content for path, content in found.items() if "ERRORS" not in path} == {"inputs/a": b"A"}
    told = found["inputs/ERRORS.txt"].decode()
    assert "gone: its server answered 404\n" in told
    assert told.count("its name is no relative path of plain names\n") == len(names)
    assert [url for url, _ in fetcher.asked] == ["https://files.example/a", "https://files.example/gone?signature=hush"]
    assert "action=stage" in caplog.text
    assert "hush" not in caplog.text + told


async def test_all_files_together_have_a_limit(emulator: Emulator, client: AsyncAnthropic) -> None:
    emulator.create_session(metadata={f"input:{name}": f"https://files.example/{name}" for name in "abc"})
    fetcher = FakeFetcher(a=b"x" * MAX_INPUT_BYTES, b=b"x" * (MAX_INPUT_BYTES - 10), c=b"x" * 11)
    found = await Stager(client, fetcher).files(await job_of(client, emulator))
    assert sorted(found) == ["inputs/ERRORS.txt", "inputs/a", "inputs/b"]
    assert [limit for _, limit in fetcher.asked] == [MAX_INPUT_BYTES, MAX_INPUT_BYTES, 10]
    assert MAX_BYTES == 2 * MAX_INPUT_BYTES


async def test_skills_and_files_share_the_limit_of_what_travels_in_one_request(
    emulator: Emulator, client: AsyncAnthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", 100)
    emulator.switch(sessions_token_may_read_skills=False)
    skill_id = emulator.add_skill("pdf", {"SKILL.md": "x" * 60}, "zip")
    emulator.create_session(skills=[skill_id], metadata={"input:a": "https://files.example/a"})
    fetcher = FakeFetcher(a=b"x" * 41)
    found = await Stager(client, fetcher).files(await job_of(client, emulator))
    assert sorted(found) == ["inputs/ERRORS.txt", "skills/pdf/SKILL.md"]
    assert [limit for _, limit in fetcher.asked] == [40]


# --- and never instead of serving ------------------------------------------------------------------------------------


async def test_a_session_that_cannot_be_read_is_launched_all_the_same(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = emulator.create_session(metadata={"input:a": "https://files.example/a"})
    detour.changes.append(
        lambda request, _: httpx2.Response(403, json={}) if request.url.path.endswith(session_id) else None
    )
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    assert (provider.started, provider.files) == ([session_id], [{}])
    assert "action=stage" in caplog.text


async def test_a_server_that_hangs_does_not_keep_the_launch(
    emulator: Emulator, make_dispatcher: MakeDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "STAGE_SECONDS", 0.0)
    session_id = emulator.create_session(metadata={"input:a": "https://files.example/a"})
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    assert (provider.started, provider.files) == ([session_id], [{}])
