"""Skills and their versions: what a worker unpacks before it runs the session's tools. Pure.

A version is addressed by its id. Requests that carry the `skills-2025-10-02` beta address it by its moment of creation
instead, in microseconds since the epoch (SDK docstring); older workers do.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from ..errors import Invalid, NotFound
from .ids import new_id

Archive = Literal["zip", "tar"]
LATEST = "latest"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ARCHIVE_DATE = (2026, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class SkillVersion:
    id: str
    skill_id: str
    name: str
    description: str
    created_at: datetime
    files: Mapping[str, bytes]
    archive: Archive

    @property
    def epoch(self) -> str:
        return str((self.created_at - _EPOCH) // _MICROSECOND)

    def content(self) -> bytes:
        """The files in one directory named after the skill; a file that begins with `#!` is executable."""
        packed = io.BytesIO()
        if self.archive == "zip":
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bundle:
                for path, data in self.files.items():
                    entry = zipfile.ZipInfo(f"{self.name}/{path}", _ARCHIVE_DATE)
                    entry.create_system = 3  # Unix, so that the mode is read
                    entry.external_attr = (0o100000 | _mode(data)) << 16
                    bundle.writestr(entry, data)
            return packed.getvalue()
        with tarfile.open(fileobj=packed, mode="w:gz") as tarball:
            for path, data in self.files.items():
                member = tarfile.TarInfo(f"{self.name}/{path}")
                member.size, member.mode = len(data), _mode(data)
                tarball.addfile(member, io.BytesIO(data))
        return packed.getvalue()


@dataclass
class Skill:
    id: str
    name: str
    display_name: str
    created_at: datetime
    versions: list[SkillVersion] = field(default_factory=list)

    @property
    def latest(self) -> SkillVersion:
        return self.versions[-1]

    def add(self, files: Mapping[str, bytes], archive: Archive, now: datetime) -> SkillVersion:
        """A new version; its moment of creation is its own, because old clients address it by that."""
        moment = max(now, self.latest.created_at + _MICROSECOND) if self.versions else now
        front = _front_matter(files)
        if front.get("name", self.name) != self.name:
            raise Invalid(f"files: SKILL.md names {front['name']!r}, but this skill is {self.name!r}")
        description = front.get("description", "")
        version = SkillVersion(new_id("skillver"), self.id, self.name, description, moment, dict(files), archive)
        self.versions.append(version)
        return version

    def version(self, reference: str, *, by_epoch: bool, may_be_latest: bool) -> SkillVersion:
        """Only the retrieve endpoint resolves `latest` (SDK)."""
        if reference == LATEST and may_be_latest:
            return self.latest
        for version in self.versions:
            if reference == (version.epoch if by_epoch else version.id):
                return version
        raise NotFound(f"skill {self.id} has no version {reference}")


class Skills:
    def __init__(self) -> None:
        self.all: dict[str, Skill] = {}

    def create(
        self, files: Mapping[str, bytes], now: datetime, name: str, display_name: str | None, archive: Archive
    ) -> Skill:
        """`name` is where the files lie; the name in SKILL.md's front matter wins (SDK docstring)."""
        slug = _front_matter(files).get("name", name)
        if not slug or "/" in slug or slug in (".", ".."):
            raise Invalid(f"files: {slug!r} is no name for a skill")
        skill = Skill(new_id("skill"), slug, display_name or slug, now)
        skill.add(files, archive, now)
        self.all[skill.id] = skill
        return skill

    def get(self, skill_id: str) -> Skill:
        if skill_id not in self.all:
            raise NotFound(f"skill {skill_id} not found")
        return self.all[skill_id]


def _mode(data: bytes) -> int:
    return 0o755 if data.startswith(b"#!") else 0o644


def _front_matter(files: Mapping[str, bytes]) -> dict[str, str]:
    """The plain `key: value` lines of SKILL.md's front matter."""
    if "SKILL.md" not in files:
        raise Invalid("files: no SKILL.md at the root of the skill")
    lines = files["SKILL.md"].decode(errors="replace").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    pairs = (line.partition(":") for line in lines[1 : lines.index("---", 1)])
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs if value.strip()}
