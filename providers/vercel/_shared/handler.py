"""The host seam: one raw HTTP request in, one reply out, at once (P6, P7). The only place that decides a status code.

A webhook says that there is work; it carries none. So a verified one wakes the drain and is answered, whatever the
queue holds and however slow the provider is, and a repeated one is simply another wake-up, which the drain coalesces.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass, field

from . import log
from .errors import WebhookRejected
from .webhook import Verifier, WebhookEvent

MAX_BODY_BYTES = 64 * 1024  # a webhook is thin; a real one has a few hundred bytes
_SIGNATURE_HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")
_WAKING = frozenset({"session.status_run_started"})
_SUSPICIOUS = frozenset({"session.status_idled"})  # a session that waits for a call is idle, too

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a host passes on. Header names are lower-case; the body is read only when it is worth reading."""

    method: str
    headers: Mapping[str, str]
    body: AsyncIterable[bytes]


@dataclass(frozen=True)
class Reply:
    """What the host answers."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


async def handle(
    request: Request,
    *,
    verifier: Verifier,
    wake: Callable[[WebhookEvent], None],
    suspect: Callable[[WebhookEvent], None] | None = None,
) -> Reply:
    """Answers one request to the webhook URL. `wake` must return at once: it starts a drain and does not wait.

    `suspect` is for a process that lives on and sweeps by itself: it is told which sessions healing may look at first.
    """
    if request.method != "POST":
        return _refuse(405, "only POST is answered here", allow="POST")
    if any(not request.headers.get(name) for name in _SIGNATURE_HEADERS):
        return _refuse(401, "the webhook signature is missing")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > MAX_BODY_BYTES:
        return _refuse(413, "the body is too large")
    body = bytearray()
    async for chunk in request.body:
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return _refuse(413, "the body is too large")
    try:
        event = verifier.verify(bytes(body), request.headers)
    except WebhookRejected as error:
        return _refuse(401, str(error))
    if event.type in _SUSPICIOUS and suspect is not None:
        suspect(event)
        return _reply(200, {"ok": True})
    if event.type not in _WAKING:
        return _reply(200, {"ok": True, "ignored": event.type})
    _log.info(log.line("webhook", session=event.session_id))
    wake(event)
    return _reply(200, {"ok": True})


def _refuse(status: int, reason: str, **headers: str) -> Reply:
    _log.warning(log.line("refused", reason=f"{status} {reason}"))
    return _reply(status, {"error": reason}, **headers)


def _reply(status: int, payload: Mapping[str, object], **headers: str) -> Reply:
    return Reply(status, json.dumps(payload).encode(), {"content-type": "application/json", **headers})
