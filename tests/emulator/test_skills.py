"""Skills: what the worker unpacks, what it skips, and how versions are addressed."""

from __future__ import annotations

import asyncio
import io
import tarfile
import zipfile
from pathlib import Path

import httpx2
import pytest
from anthropic import AsyncAnthropic, NotFoundError, PermissionDeniedError

from tests.emulator.support import MakeWorker, bearer, error_of, serving
from tools.emulator import Emulator, call, end, repeat_output, tools
from tools.emulator.errors import Invalid
from tools.emulator.state.skills import Archive

SKILL_MD = "---\nname: pdf\ndescription: Reads PDFs\n---\nUse scripts/hello.\n"
FILES: dict[str, bytes | str] = {
    "SKILL.md": SKILL_MD,
    "scripts/hello": "#!/bin/sh\necho hello from the skill\n",
    "data/blob": b"\x00\xff",
}
LOOK = "cat skills/pdf/SKILL.md && skills/pdf/scripts/hello && od -An -tx1 skills/pdf/data/blob && ls skills"
OLD = {"anthropic-beta": "skills-2025-10-02"}


def look(emulator: Emulator, session_id: str, command: str) -> None:
    emulator.set_script(session_id, [tools(call("bash", command=command)), repeat_output, end()])
    emulator.say(session_id, "go")


def said(emulator: Emulator, session_id: str) -> str:
    text: str = emulator.events(session_id, "agent.message")[-1]["content"][0]["text"]
    return text


@pytest.mark.parametrize("archive", ["zip", "tar"])
async def test_the_worker_unpacks_a_skill(
    emulator: Emulator, make_worker: MakeWorker, tmp_path: Path, archive: Archive
) -> None:
    skill_id = emulator.add_skill("pdf", FILES, archive)
    session_id = emulator.create_session(skills=[skill_id])
    look(emulator, session_id, LOOK)
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "stopped")

    assert said(emulator, session_id) == f"{SKILL_MD}hello from the skill\n 00 ff\npdf"
    assert list((tmp_path / "skills").iterdir()) == []  # the worker takes them away again
    asked = [(record.operation, record.path) for record in emulator.requests if "skills" in record.path]
    version = asked[1][1].split("/")[5]
    assert asked == [
        ("skills.version", f"/v1/skills/{skill_id}/versions/latest"),
        ("skills.content", f"/v1/skills/{skill_id}/versions/{version}/content"),
    ]
    assert {record.credential for record in emulator.requests if "skills" in record.path} == {"sessions_token"}


async def test_a_pinned_version_stays_and_latest_moves(emulator: Emulator, owner: AsyncAnthropic) -> None:
    skill_id = emulator.add_skill("pdf", FILES)
    first = await owner.beta.skills.versions.retrieve("latest", skill_id=skill_id)
    emulator.add_skill("pdf", {**FILES, "SKILL.md": SKILL_MD + "More.\n"})
    second = await owner.beta.skills.versions.retrieve("latest", skill_id=skill_id)

    assert (await owner.beta.skills.versions.retrieve(first.id, skill_id=skill_id)) == first
    assert first.id != second.id
    assert (first.name, first.description, first.skill_id) == ("pdf", "Reads PDFs", skill_id)
    assert (await owner.beta.skills.retrieve(skill_id)).latest_version_id == second.id
    assert [version.id async for version in owner.beta.skills.versions.list(skill_id)] == [second.id, first.id]
    old = await owner.beta.skills.versions.download(first.id, skill_id=skill_id)
    new = await owner.beta.skills.versions.download(second.id, skill_id=skill_id)
    assert zipfile.ZipFile(io.BytesIO(await old.read())).read("pdf/SKILL.md").decode() == SKILL_MD
    assert zipfile.ZipFile(io.BytesIO(await new.read())).read("pdf/SKILL.md").decode() == SKILL_MD + "More.\n"


async def test_only_retrieve_resolves_latest(emulator: Emulator, owner: AsyncAnthropic) -> None:
    skill_id = emulator.add_skill("pdf", FILES)
    with pytest.raises(NotFoundError, match="has no version latest"):
        await owner.beta.skills.versions.download("latest", skill_id=skill_id)


async def test_the_older_beta_addresses_versions_by_their_moment(
    emulator: Emulator, http: httpx2.Client, owner: AsyncAnthropic
) -> None:
    skill_id = emulator.add_skill("pdf", FILES)
    newer = await owner.beta.skills.versions.retrieve("latest", skill_id=skill_id)
    headers = bearer(emulator.environment_key) | OLD
    path = f"/v1/skills/{skill_id}/versions"
    (older,) = http.get(path, headers=headers).json()["data"]

    assert older["version"].isdigit()
    assert int(older["version"]) == round(newer.created_at.timestamp() * 1_000_000)
    assert older["directory"] == "pdf"
    assert http.get(f"{path}/{older['version']}", headers=headers).json() == older
    assert http.get(f"{path}/{older['version']}/content", headers=headers).status_code == 200
    assert http.get(f"{path}/{newer.id}", headers=headers).status_code == 404
    assert http.get(f"{path}/{older['version']}", headers=bearer(emulator.environment_key)).status_code == 404


async def test_a_skill_that_fails_is_skipped(emulator: Emulator, make_worker: MakeWorker) -> None:
    good = emulator.add_skill("pdf", FILES)
    unknown = {"type": "custom", "skill_id": "skill_gone", "version": "latest"}
    session_id = emulator.create_session(skills=[unknown, good])
    look(emulator, session_id, "ls skills")
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_idle, session_id)
    assert said(emulator, session_id) == "pdf"


async def test_a_skill_is_uploaded_with_the_sdk(emulator: Emulator, owner: AsyncAnthropic) -> None:
    upload = [(f"pdf/{path}", data.encode() if isinstance(data, str) else data) for path, data in FILES.items()]
    skill = await owner.beta.skills.create(files=upload, display_name="PDF tools")
    assert (skill.display_name, skill.source.type) == ("PDF tools", "custom")
    archive = await owner.beta.skills.versions.download(skill.latest_version_id, skill_id=skill.id)
    bundle = zipfile.ZipFile(io.BytesIO(await archive.read()))
    assert bundle.read("pdf/data/blob") == b"\x00\xff"
    assert bundle.getinfo("pdf/scripts/hello").external_attr >> 16 == 0o100755
    version = await owner.beta.skills.versions.create(skill.id, files=upload)
    assert (await owner.beta.skills.retrieve(skill.id)).latest_version_id == version.id != skill.latest_version_id
    assert [each.id async for each in owner.beta.skills.list()] == [skill.id]
    await owner.beta.skills.delete(skill.id)
    with pytest.raises(NotFoundError):
        await owner.beta.skills.retrieve(skill.id)


def test_an_upload_without_its_parts_is_refused(emulator: Emulator, http: httpx2.Client) -> None:
    headers = bearer(emulator.api_key)
    for files, complaint in (
        ([("files[]", ("pdf/notes", b"x"))], "files: no SKILL.md"),
        ([("files[]", ("pdf/SKILL.md", b"x")), ("files[]", ("doc/a", b"x"))], "files: not in one top-level"),
        ([("files[]", ("SKILL.md", b"x"))], "files: not in one top-level"),
        ([("files[]", ("pdf/../SKILL.md", b"x"))], "files: not in one top-level"),
        ([("other", ("pdf/SKILL.md", b"x"))], "other: not a body field"),
    ):
        response = http.post("/v1/skills", files=files, headers=headers)
        assert (response.status_code, error_of(response)["message"].startswith(complaint)) == (400, True), complaint
    assert error_of(http.post("/v1/skills", json={}, headers=headers))["message"] == "body: not multipart/form-data"


def test_a_skill_keeps_its_name(emulator: Emulator) -> None:
    emulator.add_skill("pdf", FILES)
    with pytest.raises(Invalid, match="this skill is 'pdf'"):
        emulator.add_skill("pdf", {"SKILL.md": "---\nname: doc\n---\n"})
    for name in ("", "..", "a/b"):
        with pytest.raises(Invalid, match="no name for a skill"):
            emulator.add_skill(name, {"SKILL.md": ""})


async def test_a_tar_keeps_modes_too(emulator: Emulator, owner: AsyncAnthropic) -> None:
    skill_id = emulator.add_skill("pdf", FILES, "tar")
    version = await owner.beta.skills.versions.retrieve("latest", skill_id=skill_id)
    packed = await owner.beta.skills.versions.download(version.id, skill_id=skill_id)
    with tarfile.open(fileobj=io.BytesIO(await packed.read())) as tarball:
        assert {member.name: member.mode for member in tarball} == {
            "pdf/SKILL.md": 0o644,
            "pdf/scripts/hello": 0o755,
            "pdf/data/blob": 0o644,
        }


async def test_who_may_read_skills(emulator: Emulator, runner: AsyncAnthropic) -> None:
    skill_id = emulator.add_skill("pdf", FILES)
    assert (await runner.beta.skills.versions.retrieve("latest", skill_id=skill_id)).name == "pdf"
    with pytest.raises(PermissionDeniedError, match=r"skills\.list does not accept an environment key"):
        await runner.beta.skills.list()
