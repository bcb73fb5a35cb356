"""The endpoints of skills: uploaded by their owner, downloaded by workers."""

from __future__ import annotations

from email.message import Message
from email.parser import BytesParser
from typing import Any, cast

from starlette.responses import Response

from .. import replies
from ..errors import Invalid
from ..memory_params import SkillListQuery, SkillVersionListQuery
from ..requests import Call
from ..state.skills import SkillVersion

Json = dict[str, Any]
BY_EPOCH = "skills-2025-10-02"
_MEDIA_TYPES = {"zip": "application/zip", "tar": "application/gzip"}


async def create_skill(call: Call) -> Json:
    call.no_query()
    directory, files, display_name = _upload(call)
    with call.engine.transact() as now:
        skill = call.world.skills.create(files, now, directory, display_name, "zip")
        return replies.skill(skill)


async def list_skills(call: Call) -> Json:
    query = call.query(SkillListQuery)
    with call.engine.transact():
        items = [it for it in reversed(call.world.skills.all.values()) if query.source in (None, "custom")]
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.skill(it) for it in shown], "next_page": next_page}


async def get_skill(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.skill(call.world.skills.get(call.path["skill_id"]))


async def delete_skill(call: Call) -> Json:
    call.no_body()
    with call.engine.transact():
        skill = call.world.skills.get(call.path["skill_id"])
        del call.world.skills.all[skill.id]
        return {"id": skill.id, "type": "skill_deleted"}


async def create_version(call: Call) -> Json:
    call.no_query()
    _, files, _ = _upload(call)
    with call.engine.transact() as now:
        skill = call.world.skills.get(call.path["skill_id"])
        return replies.skill_version(skill.add(files, "zip", now), by_epoch=_by_epoch(call))


async def list_versions(call: Call) -> Json:
    query = call.query(SkillVersionListQuery)
    with call.engine.transact():
        items = call.world.skills.get(call.path["skill_id"]).versions[::-1]
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        data = [replies.skill_version(it, by_epoch=_by_epoch(call)) for it in shown]
        return {"data": data, "next_page": next_page}


async def get_version(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.skill_version(_version(call, may_be_latest=True), by_epoch=_by_epoch(call))


async def get_content(call: Call) -> Response:
    call.no_query()
    with call.engine.transact():
        version = _version(call, may_be_latest=False)
    return Response(version.content(), media_type=_MEDIA_TYPES[version.archive])


def _version(call: Call, *, may_be_latest: bool) -> SkillVersion:
    skill = call.world.skills.get(call.path["skill_id"])
    return skill.version(call.path["version"], by_epoch=_by_epoch(call), may_be_latest=may_be_latest)


def _by_epoch(call: Call) -> bool:
    return BY_EPOCH in call.betas


def _upload(call: Call) -> tuple[str, dict[str, bytes], str | None]:
    """The directory all files of a multipart upload lie in, the files by their paths below it, the display name."""
    head = f"content-type: {call.content_type}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + call.content)
    if not message.is_multipart():
        raise Invalid("body: not multipart/form-data")
    files: dict[str, bytes] = {}
    display_name: str | None = None
    for part in cast(list[Message], message.get_payload()):
        field = part.get_param("name", header="content-disposition")
        data = cast(bytes, part.get_payload(decode=True))
        if field == "files[]":
            files[str(part.get_filename())] = data
        elif field == "display_name":
            display_name = data.decode()
        else:
            raise Invalid(f"{field}: not a body field this emulator knows")
    directories = {path.partition("/")[0] for path in files}
    if len(directories) != 1 or any("/" not in path or ".." in path.split("/") for path in files):
        raise Invalid("files: not in one top-level directory")
    (directory,) = directories
    return directory, {path.partition("/")[2]: data for path, data in files.items()}, display_name
