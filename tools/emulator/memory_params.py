"""What requests about skills and memory stores may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from .params import PAGE, Metadata, MetadataPatch, PageQuery, Params

MOST_WITH_CONTENT = 20
"""Documented: a page with `view=full` holds no more, whatever the limit says."""

View = Literal["basic", "full"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
StoreName = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")]
Description = Annotated[str, StringConstraints(max_length=1024)]


class SkillListQuery(Params):
    limit: int = Field(default=20, ge=1, le=1000)
    page: str | None = None
    source: str | None = None


class SkillVersionListQuery(Params):
    limit: int = Field(default=20, ge=1, le=1000)
    page: str | None = None


class MemoryStoreCreateBody(Params):
    name: StoreName
    description: Description = ""
    metadata: Metadata = Field(default_factory=dict)


class MemoryStoreUpdateBody(Params):
    name: StoreName | None = None
    description: Description | None = None
    metadata: MetadataPatch | None = None


class MemoryStoreListQuery(PageQuery):
    include_archived: bool = False
    created_at_gte: AwareDatetime | None = Field(default=None, alias="created_at[gte]")
    created_at_lte: AwareDatetime | None = Field(default=None, alias="created_at[lte]")


class MemoryListQuery(Params):
    view: View = "basic"
    limit: int = PAGE
    page: str | None = None
    path_prefix: str = "/"
    depth: int = Field(default=0, ge=0)


class MemoryCreateQuery(Params):
    view: View = "basic"


class MemoryRetrieveQuery(Params):
    view: View = "full"


class MemoryCreateBody(Params):
    path: str
    content: str | None
    """The type allows null and the docstring does not explain it; an empty memory is what is left."""


class Precondition(Params):
    type: Literal["content_sha256"]
    content_sha256: Sha256


class MemoryUpdateBody(Params):
    path: str | None = None
    content: str | None = None
    precondition: Precondition | None = None


class MemoryDeleteQuery(Params):
    expected_content_sha256: Sha256 | None = None
