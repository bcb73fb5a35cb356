"""What a host in TypeScript brings into a sandbox (R12): some of Python's tests, and its own of input files."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.shared import test_staging
from tests.shared import typescript_core as ts
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import Detour, FakeProvider
from tests.shared.test_staging import SKILL, STAGED, FakeFetcher
from tests.shared.test_typescript_core import core, make_dispatcher
from tools.emulator import Emulator

__all__ = ["core", "make_dispatcher"]

test_refused_skills_are_brought = test_staging.test_skills_that_the_token_may_not_read_are_brought
test_others_are_not = test_staging.test_skills_that_the_token_may_read_are_the_runners_own_business
test_without_the_setting = test_staging.test_without_the_setting_no_session_is_looked_at
test_an_unreadable_session = test_staging.test_a_session_that_cannot_be_read_is_launched_all_the_same


class SlowFetcher(FakeFetcher):
    """Needs a fifth of a second for a file."""

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        await asyncio.sleep(0.2)
        return await super().fetch(url, max_bytes)


@pytest.fixture(autouse=True)
async def _attached(core: ts.Core, detour: Detour) -> AsyncIterator[None]:
    async with core.attached(detour):
        yield


async def test_a_broken_skill_keeps_no_other(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.switch(sessions_token_may_read_skills=False)
    broken, good = (
        emulator.add_skill("broken", {"SKILL.md": "", "../x": "out"}, "zip"),
        emulator.add_skill("good", SKILL, "tar"),
    )
    emulator.create_session(skills=[broken, good])
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    assert sorted(provider.files[0]) == ["skills/good/SKILL.md", "skills/good/scripts/hello"]
    assert f"skill {broken} is left out: an entry leads out of it" in caplog.text


async def test_named_files_are_brought_and_what_cannot_be_had_is_told(
    emulator: Emulator, core: ts.Core, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    bad = ["../up", "/root", "a//b", ".hidden", "a/../b", "c:\\x"]
    metadata = {f"input:{name}": "https://files.example/a" for name in bad}
    metadata |= {"input:gone": "https://files.example/gone?signature=hush", "customer": "https://files.example/b"}
    metadata |= {"input:deep/a b.txt": "https://files.example/a", "input:plain": "http://files.example/a"}
    emulator.create_session(metadata=metadata)
    core.fetcher = FakeFetcher(a=b"A")
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    (found,) = provider.files
    told = found.pop("inputs/ERRORS.txt").decode()
    assert found == {"inputs/deep/a b.txt": b"A"}
    assert "gone: its server answered 404\n" in told
    assert "plain: it is not https\n" in told
    assert told.count("its name is no relative path of plain names\n") == len(bad)
    assert [url for url, _ in core.fetcher.asked] == [
        "https://files.example/a",
        "https://files.example/gone?signature=hush",
    ]
    assert "hush" not in caplog.text + told


async def test_one_file_and_all_of_them_have_a_limit(
    emulator: Emulator, core: ts.Core, make_dispatcher: MakeDispatcher
) -> None:
    mib = 1024 * 1024
    emulator.create_session(metadata={f"input:{name}": f"https://files.example/{name}" for name in "abcd"})
    core.fetcher = FakeFetcher(a=b"x" * (10 * mib), b=b"x" * (10 * mib + 1), c=b"x" * (10 * mib - 1), d=b"xx")
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    (found,) = provider.files
    assert found.pop("inputs/ERRORS.txt") == b"b: it is larger than 10485760 bytes\nd: it is larger than 1 bytes\n"
    assert {path: len(content) for path, content in found.items()} == {"inputs/a": 10 * mib, "inputs/c": 10 * mib - 1}


async def test_skills_and_files_share_the_limit_of_what_travels_in_one_call(
    emulator: Emulator, core: ts.Core, make_dispatcher: MakeDispatcher
) -> None:
    mib = 1024 * 1024
    emulator.switch(sessions_token_may_read_skills=False)
    skill = emulator.add_skill("large", {"SKILL.md": "x" * (12 * mib)}, "zip")
    emulator.create_session(skills=[skill], metadata={"input:a": "https://files.example/a"})
    core.fetcher = FakeFetcher(a=b"x" * (9 * mib))
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED).drain()
    (found,) = provider.files
    assert found["inputs/ERRORS.txt"] == f"a: it is larger than {8 * mib} bytes\n".encode()
    assert sorted(found) == ["inputs/ERRORS.txt", "skills/large/SKILL.md"]


async def test_a_server_that_hangs_does_not_keep_the_launch(
    emulator: Emulator, core: ts.Core, make_dispatcher: Any
) -> None:
    session_id = emulator.create_session(metadata={"input:a": "https://files.example/a"})
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED, stage_seconds=0.0).drain()
    assert (provider.started, provider.files) == ([session_id], [{}])


async def test_the_time_that_staging_took_is_the_launchs(
    emulator: Emulator, core: ts.Core, make_dispatcher: Any
) -> None:
    """A launch that began so late could still be under way when its item is offered again."""
    session_id = emulator.create_session(metadata={"input:a": "https://files.example/a"})
    core.fetcher = SlowFetcher(a=b"A")
    provider = FakeProvider()
    await make_dispatcher(provider, settings=STAGED, launch_seconds=0.05).drain()
    assert provider.started == []
    assert emulator.work(session_id)["state"] == "queued"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://files.example/hush", "it is not https"),
        ("file:///etc/hush", "it is not https"),
        ("hush", "it has no usable address"),
        ("https://files.example:hush/", "it has no usable address"),
        ("https://user:hush@files.example/", "its address has a password in it"),
        ("https://127.0.0.2/hush", "its host is a number and not a name"),
        ("https://2130706434/hush", "its host is a number and not a name"),
        ("https://0x7f.1/hush", "its host is a number and not a name"),
        ("https://[::ffff:127.0.0.1]/hush", "its host is a number and not a name"),
        ("https://169.254.169.254./hush", "its host is a number and not a name"),
        ("https://localhost/hush", "its host is no name of the public internet"),
        ("https://a.localhost./hush", "its host is no name of the public internet"),
        ("https://metadata.google.internal/hush", "its host is no name of the public internet"),
        ("https://intranet/hush", "its host is no name of the public internet"),
    ],
)
def test_what_is_no_public_https_address_is_refused_also_behind_a_redirect(
    core: ts.Core, url: str, reason: str
) -> None:
    assert core.call("fetchPublic", url=url, answers=[]) == reason
    moved = {"status": 302, "headers": {"location": url}, "body": ""}
    assert core.call("fetchPublic", url="https://files.example/a", answers=[moved]) == (
        reason if url != "hush" else "its server answered 404"  # there it is a relative one
    )


def test_an_answer_that_is_no_file_is_refused(core: ts.Core) -> None:
    def answer(status: int, body: bytes = b"", **headers: str) -> dict[str, Any]:
        return {"status": status, "headers": headers, "body": base64.b64encode(body).decode()}

    def fetch(*answers: dict[str, Any]) -> str:
        text: str = core.call("fetchPublic", url="https://files.example/a", answers=list(answers), maxBytes=100)
        return text

    moved = answer(301, location="https://other.example/b")
    assert fetch(answer(200, b"x" * 100)) == f"content {'x' * 100}"
    assert fetch(moved, moved, moved, answer(200, b"there")) == "content there"
    assert fetch(*[moved] * 4, answer(200, b"there")) == "its server redirects more than 3 times"
    assert fetch(answer(503, b"hush")) == "its server answered 503"
    assert fetch(answer(302)) == "its server answered 302"
    assert fetch(answer(200, b"x" * 101)) == "it is larger than 100 bytes"
    assert fetch({"throws": "hush"}) == "its server could not be read: TypeError"
    assert fetch({"hangs": True}) == "it did not arrive within 0.1 s"
