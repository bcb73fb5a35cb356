"""What requests to the admin API may say. Values that a fault refuses itself are not checked twice."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .clock import MOST_SECONDS
from .params import Params
from .watch import Awaited

MAX_WAIT_SECONDS = 600.0


class FaultBody(Params):
    operation: str
    kind: Literal["delay", "delay_request", "drop", "fail", "lose_response", "duplicate"]
    count: int | None = 1
    status: int = 500
    seconds: float = 0.0
    after: int = 0


class CutBody(Params):
    session_id: str | None = None
    after_events: int = 0
    count: int = 1


class WebhookFaultBody(Params):
    kind: Literal["lose", "delay", "duplicate", "reorder"]
    count: int = 1
    seconds: float = 0.0


class ClockBody(Params):
    advance: float | None = None
    skew: float | None = Field(default=None, ge=-MOST_SECONDS, le=MOST_SECONDS)


class WebhooksBody(Params):
    url: str | None = None
    paused: bool | None = None
    enabled: Literal[True] | None = None


class ExecutionBody(Params):
    call: str = Field(min_length=1)
    runner: str = Field(min_length=1)
    session_id: str | None = None
    lease_epoch: int | None = None


class HealthcheckBody(Params):
    environment_id: str | None = None


class EnvironmentBody(Params):
    name: str = Field(default="another", min_length=1)


class SessionBody(Params):
    title: str | None = None
    environment_id: str | None = None
    text: str | None = Field(default=None, min_length=1)


class StopBody(Params):
    force: bool = False


class ScriptBody(Params):
    steps: list[Any]


class SinceQuery(Params):
    since: int = Field(default=0, ge=0)


class WaitQuery(Params):
    until: Awaited
    timeout: float = Field(default=10.0, gt=0, le=MAX_WAIT_SECONDS)
