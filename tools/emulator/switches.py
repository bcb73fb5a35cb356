"""The facts of the control plane that no recording settles, each as a switch. The first value is the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints


@dataclass
class Switches:
    """Which of the possible servers the emulator plays.

    An emulator works on a copy of its own; `Emulator.switch()`, the admin API and a scenario change it in mid-flight,
    for whatever happens from then on. ValueError for a value no server is known to have.
    """

    credentials: Literal["strict", "lenient"] = "strict"
    """`strict` follows the newest per-endpoint notes; `lenient` takes every valid credential of the right scope."""

    secret: Literal["present", "null", "undecodable", "extra_keys"] = "present"  # noqa: S105 - a mode
    """What a poll hands out beside the item: a token, nothing, garbage, or a token among keys no client knows."""

    repeated_secret: Literal["fresh", "fresh_only", "same"] = "fresh"  # noqa: S105 - a mode
    """The secret of an item that is handed out again: fresh, fresh and the old token refused, or the same one."""

    work_id: Literal["session_id", "work_"] = "session_id"
    """Recorded: the work id is the session id. The reference shows `work_…`; clients must not care."""

    ack_on_claimed: Literal[200, 409] = 200
    """The answer to an ack of an item that has been acknowledged and lives."""

    ack_on_stopped: Literal[404, 409] = 404
    """The answer to an ack of a stopped item."""

    heartbeat_on_queued: Literal[412, 404, 409] = 412
    """The answer to a beat on an item that nobody has acknowledged."""

    never_beaten: Literal["lapse", "frozen"] = "lapse"
    """An item acknowledged and never beaten: its lease runs from the ack, or it stays `starting` (reported)."""

    lease_lapse: Literal["stop", "requeue", "never"] = "stop"
    """Recorded: a lapsed lease ends in `stopped`. The newest SDK also expects a re-queue. A server whose sweeper is
    down leaves the item as it is."""

    created_at_after_requeue: Literal["kept", "new"] = "kept"
    """Whether a queued-again item shows when it was first created, or when it was queued again."""

    stop_reply: Literal[200, 204] = 200
    """Recorded: a stop answers with the item. Older servers answered without a body."""

    force_stop_stamps: Literal["equal", "different"] = "equal"
    """Whether a force-stop out of the blue sets `stop_requested_at` and `stopped_at` to the same instant."""

    token_after_stop: Literal["valid", "401"] = "valid"  # noqa: S105 - a mode
    """Whether a sessions token outlives its item: for an hour, or not at all."""

    result_on_stopped_item: Literal["queues", "ignored"] = "queues"
    """Whether a tool result or confirmation for a session without a live item queues it again."""

    message_to_stranded_session: Literal["queues", "400"] = "queues"
    """A message to a session that waits for a call while its item is stopped: queued, or refused (reported)."""

    interrupted_call: Literal["left_open", "closed"] = "left_open"
    """What an interrupt does to the open calls: nothing, or an error result of the server's own."""

    result_for_closed_call: Literal[400, 200] = 400
    """A result for a call that was closed without one: refused, or accepted and ignored."""

    duplicate_tool_result: Literal[400, 200] = 400
    """A second result for a call: refused, or accepted and ignored."""

    environment_key_may_answer: bool = True
    """Whether the environment key may send interrupts, results and confirmations (403 otherwise)."""

    sessions_token_may_read_skills: bool = True
    """Whether a sessions token may retrieve and download skills (403 otherwise)."""

    unprocessed_input_at_stop: Literal["requeue", "strand"] = "requeue"
    """Whether a stop queues the session again when messages still wait for their turn."""

    def __post_init__(self) -> None:
        self.change({each.name: getattr(self, each.name) for each in fields(self)})

    def change(self, values: Mapping[str, Any]) -> None:
        """Set all of `values` or none; ValueError names the first that does not fit."""
        options = values_of()
        checked: dict[str, Any] = {}
        for name, value in values.items():
            if name not in options:
                raise ValueError(f"{name}: not a switch; there are {', '.join(options)}")
            # By type as well: in Python True equals 1, and 200.0 equals 200.
            fitting = [option for option in options[name] if option == value and type(option) is type(value)]
            if not fitting:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, options[name]))}")
            checked[name] = fitting[0]
        for name, value in checked.items():
            setattr(self, name, value)


def values_of() -> dict[str, tuple[Any, ...]]:
    """Every switch with its values, the default first."""
    hints = get_type_hints(Switches)
    return {each.name: get_args(hints[each.name]) or (True, False) for each in fields(Switches)}


def parse_switch(text: str) -> tuple[str, Any]:
    """`name=value` as a command line spells it: `ack_on_stopped=409`, `environment_key_may_answer=false`."""
    name, equals, wanted = text.partition("=")
    options = values_of().get(name)
    if options is None or not equals:
        raise ValueError(f"{text!r} is not NAME=VALUE; the names are {', '.join(values_of())}")
    for option in options:
        if str(option).lower() == wanted.lower():
            return name, option
    raise ValueError(f"{name}: {wanted!r} is not one of {', '.join(str(option) for option in options)}")
