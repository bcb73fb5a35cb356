"""What goes wrong with webhooks, by count."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from .clock import span
from .state.ids import new_id

WebhookFaultKind = Literal["lose", "delay", "duplicate", "reorder"]


@dataclass
class WebhookFault:
    """What happens to the next `count` webhooks. They are counted where they are sent, not per attempt.

    `lose`: never sent. `delay`: sent `seconds` of the emulator's clock later. `duplicate`: sent twice, with one id.
    `reorder`: held back until another one has been sent, and then sent after it, the youngest first.
    """

    kind: WebhookFaultKind
    count: int = 1
    seconds: float = 0.0
    hits: int = 0
    id: str = field(default_factory=lambda: new_id("fault"))

    def __post_init__(self) -> None:
        if self.kind not in get_args(WebhookFaultKind):
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(get_args(WebhookFaultKind))}")
        if self.count < 1:
            raise ValueError("count: at least 1")
        if self.kind == "delay" and self.seconds <= 0:
            raise ValueError("seconds: delay needs a positive number")
        span(self.seconds)

    def shown(self) -> dict[str, Any]:
        return {"on": "webhook", **asdict(self)}
