"""Server-sent events: the framing the SDKs' decoders want, and the keep-alive between events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response, StreamingResponse

from .engine import Engine, wait_event

KEEP_ALIVE_SECONDS = 15.0
_PING = 'event: ping\ndata: {"type": "ping"}\n\n'


def stream(engine: Engine, session_id: str, events: Sequence[dict[str, Any]]) -> Response:
    """What is appended to `events` from now on; call it with the world locked, so that "now" is exact."""
    headers = {"cache-control": "no-cache"}
    frames = _frames(engine, session_id, events, len(events))
    return StreamingResponse(frames, media_type="text/event-stream", headers=headers)


async def _frames(engine: Engine, session_id: str, events: Sequence[dict[str, Any]], sent: int) -> AsyncIterator[str]:
    with engine.listen(session_id) as changed:
        while not engine.is_closing:
            changed.clear()
            with engine.transact():
                fresh = events[sent:]
            sent += len(fresh)
            for event in fresh:
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
                if event["type"] == "session.deleted":
                    return
            if not await wait_event(changed, KEEP_ALIVE_SECONDS):
                yield _PING
