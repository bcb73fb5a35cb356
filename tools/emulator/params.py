"""What requests may say: the fields of the SDK's params types that the emulator models, and no others."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from .clock import MOST_SECONDS
from .errors import Invalid

MAX_TTL_SECONDS = 3600  # a limit of ours: how the server clamps desired_ttl_seconds is open
PAGE = Field(default=20, ge=1, le=100)

MOST_METADATA = 16

Access = Literal["read_write", "read_only"]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MOST_METADATA)]
MetadataPatch = dict[MetadataKey, MetadataValue | None]


class Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NoParams(Params):
    """Nothing at all, which includes an empty JSON object."""


# Work


class PollQuery(Params):
    block_ms: int | None = Field(default=None, ge=1, le=999)
    reclaim_older_than_ms: int = Field(default=5000, ge=0, le=int(MOST_SECONDS * 1000))


class HeartbeatQuery(Params):
    expected_last_heartbeat: str | None = None
    desired_ttl_seconds: int | None = Field(default=None, ge=1, le=MAX_TTL_SECONDS)


class StopBody(Params):
    force: bool = False


class WorkUpdateBody(Params):
    metadata: dict[str, str | None] = Field(default_factory=dict)


class PageQuery(Params):
    limit: int = PAGE
    page: str | None = None


# Environments and agents


class SelfHosted(Params):
    type: Literal["self_hosted"]


class EnvironmentCreateBody(Params):
    name: str = Field(min_length=1)
    config: SelfHosted
    description: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    scope: Literal["organization"] | None = None


class EnvironmentUpdateBody(Params):
    name: str | None = Field(default=None, min_length=1)
    description: str | None = None
    metadata: dict[str, str | None] = Field(default_factory=dict)


class ModelConfig(Params):
    id: str = Field(min_length=1)
    speed: Literal["standard", "fast"] = "standard"


class Skill(Params):
    type: Literal["anthropic", "custom"]
    skill_id: str
    version: str | None = None


class AgentCreateBody(Params):
    name: str = Field(min_length=1)
    model: str | ModelConfig
    description: str | None = None
    system: str | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    skills: list[Skill] = Field(default_factory=list)
    mcp_servers: list[dict[str, Any]] = Field(default_factory=list)
    metadata: dict[str, str] = Field(default_factory=dict)


# Sessions


class AgentReference(Params):
    id: str
    type: Literal["agent"]
    version: int | None = Field(default=None, ge=1)


class MemoryStoreResource(Params):
    type: Literal["memory_store"]
    memory_store_id: str
    access: Access | None = None
    instructions: str | None = Field(default=None, max_length=4096)


class OtherResource(BaseModel):
    """A file or a repository, which no self-hosted session takes (documented)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: Literal["file", "github_repository"]


Resource = Annotated[MemoryStoreResource | OtherResource, Field(discriminator="type")]


class SessionUpdateBody(Params):
    title: str | None = None
    metadata: MetadataPatch | None = None


# Events


class TextBlock(Params):
    type: Literal["text"]
    text: str = Field(min_length=1)


class SourceBlock(BaseModel):
    """An image, document or search result: kept as it came, the scripted agent looks at text only."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: Literal["image", "document", "search_result"]


Content = list[Annotated[TextBlock | SourceBlock, Field(discriminator="type")]]


class UserMessage(Params):
    type: Literal["user.message"]
    content: Content = Field(min_length=1)


class UserInterrupt(Params):
    type: Literal["user.interrupt"]
    session_thread_id: str | None = None


class ToolConfirmation(Params):
    type: Literal["user.tool_confirmation"]
    tool_use_id: str
    result: Literal["allow", "deny"]
    deny_message: str | None = None

    @model_validator(mode="after")
    def _deny_message_needs_deny(self) -> ToolConfirmation:
        if self.deny_message is not None and self.result != "deny":
            raise ValueError("deny_message is only allowed when result is 'deny'")
        return self


class UserToolResult(Params):
    type: Literal["user.tool_result"]
    tool_use_id: str
    content: Content | None = None
    is_error: bool | None = None


class CustomToolResult(Params):
    type: Literal["user.custom_tool_result"]
    custom_tool_use_id: str
    content: Content | None = None
    is_error: bool | None = None


Result = UserToolResult | CustomToolResult
Inbound = Annotated[
    UserMessage | UserInterrupt | ToolConfirmation | UserToolResult | CustomToolResult, Field(discriminator="type")
]


class EventsBody(Params):
    events: list[Inbound] = Field(min_length=1)


class SessionCreateBody(Params):
    agent: str | AgentReference
    environment_id: str
    title: str | None = None
    metadata: Metadata = Field(default_factory=dict)
    initial_events: list[UserMessage] = Field(default_factory=list, max_length=50)
    resources: list[Resource] = Field(default_factory=list)
    vault_ids: list[str] = Field(default_factory=list)


P = TypeVar("P", bound=Params)


def json_object(content: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises `Invalid`, also for half of a surrogate pair: no answer could carry it."""
    try:
        values = json.loads(content)
        if b"\\u" in content or not content.isascii():
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Invalid("body: half of a surrogate pair (\\ud800 to \\udfff) is no character") from error
    except (ValueError, RecursionError) as error:
        raise Invalid("body: not JSON") from error
    if not isinstance(values, dict):
        raise Invalid("body: not a JSON object")
    return values


def parse(model: type[P], values: Any, where: str) -> P:
    """`values` as `model`, or Invalid that names the first field that does not fit (`where`: body, query, …)."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or where
        if first["type"] == "extra_forbidden":
            raise Invalid(f"{field}: not a {where} field this emulator knows") from error
        raise Invalid(f"{field}: {first['msg']}") from error
