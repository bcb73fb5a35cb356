"""The facts of the control plane that no recording settles, each as a switch. The first value is the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Switches:
    """Which of the possible servers the emulator plays. Immutable: an emulator keeps its switches for life."""

    credentials: Literal["strict", "lenient"] = "strict"
    """`strict` follows the newest per-endpoint notes; `lenient` takes every valid credential of the right scope."""

    secret: Literal["present", "null", "undecodable", "extra_keys"] = "present"  # noqa: S105 - a mode
    """What a poll hands out beside the item: a token, nothing, garbage, or a token among keys no client knows."""

    work_id: Literal["session_id", "work_"] = "session_id"
    """Recorded: the work id is the session id. The reference shows `work_…`; clients must not care."""

    heartbeat_on_queued: Literal[412, 404, 409] = 412
    """The answer to a beat on an item that nobody has acknowledged."""

    lease_lapse: Literal["stop", "requeue"] = "stop"
    """Recorded: a lapsed lease ends in `stopped`. The newest SDK also expects a re-queue."""

    token_after_stop: Literal["valid", "401"] = "valid"  # noqa: S105 - a mode
    """Whether a sessions token outlives its item: for an hour, or not at all."""

    result_on_stopped_item: Literal["queues", "ignored"] = "queues"
    """Whether a tool result or confirmation for a session without a live item queues it again."""

    environment_key_may_answer: bool = True
    """Whether the environment key may send interrupts, tool results and confirmations (403 otherwise)."""

    unprocessed_input_at_stop: Literal["requeue", "strand"] = "requeue"
    """Whether a stop queues the session again when messages still wait for their turn."""
