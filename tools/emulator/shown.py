"""The clock as clients see it: every timestamp that leaves is moved by the skew, what comes back is moved back.

The rules never see a skew, so no lease lives longer for one. A beat's timestamp comes back as it was shown, also when
the skew has changed in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from email.utils import format_datetime
from typing import Any

from .clock import Clock, stamp

_BEATS = ("last_heartbeat", "latest_heartbeat_at")
_FREE = ("metadata", "input", "content", "tools")
"""Fields that are the clients' own: nothing in them is the emulator's to move."""


class ShownClock:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._beats: dict[str, str] = {}

    def date(self) -> str:
        """For the `date` header: where clients read the server's time."""
        return format_datetime(self._clock.now() + self._clock.skew, usegmt=True)

    def moment(self, at: datetime) -> str:
        return stamp(at + self._clock.skew)

    def wall_seconds(self, seconds: float) -> int:
        return int(seconds + self._clock.skew.total_seconds())

    def body(self, value: Any) -> Any:
        """A JSON body with its timestamps moved."""
        return self._moved(value, "") if self._clock.skew else value

    def frame(self, frame: str) -> str:
        """The same for a frame of an event stream."""
        if not self._clock.skew:
            return frame
        head, _, data = frame.partition("\ndata: ")
        return f"{head}\ndata: {json.dumps(self.body(json.loads(data)))}\n\n"

    def _moved(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: each if key in _FREE else self._moved(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [self._moved(each, name) for each in value]
        if isinstance(value, str) and value and (name.endswith("_at") or name in _BEATS):
            shown = self.moment(datetime.fromisoformat(value))
            if name in _BEATS:
                self._beats[shown] = value
            return shown
        return value

    def query(self, values: dict[str, Any]) -> dict[str, Any]:
        """The parameters of a request as the rules know the time."""
        return {name: self._back(name, value) for name, value in values.items()}

    def _back(self, name: str, value: Any) -> Any:
        if name == "expected_last_heartbeat":
            return self._beats.get(value, value)
        if name.startswith("created_at[") and self._clock.skew:
            try:
                return (datetime.fromisoformat(value) - self._clock.skew).isoformat()
            except (ValueError, OverflowError):
                return value  # refused later, with its name
        return value
