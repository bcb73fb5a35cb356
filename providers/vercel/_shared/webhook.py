"""Webhook signatures: the SDK's own check, with what it leaves open closed.

Keys come as base64 in either alphabet, padded or not; the library underneath silently drops `-` and `_` and checks with
a shorter key. And it raises three kinds of error for a malformed signature, of which only one says "rejected".
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anthropic import AsyncAnthropic
from standardwebhooks.webhooks import WebhookVerificationError

from .errors import SettingsError, WebhookRejected

_PREFIX = "whsec_"
_KEY_BYTES = 32  # documented


@dataclass(frozen=True)
class WebhookEvent:
    """What a webhook says: something happened to a session. Thin by design; the queue holds the work."""

    id: str
    type: str
    session_id: str


def normalise_key(key: str) -> str:
    """The signing key in the one form the library decodes in full. Raises `SettingsError`, never quoting the key."""
    encoded = key.strip().removeprefix(_PREFIX).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise SettingsError("the webhook signing key is not base64: copy it again, from whsec_ on") from None
    if len(raw) != _KEY_BYTES:
        raise SettingsError(f"the webhook signing key has {len(raw)} bytes instead of {_KEY_BYTES}: copy it again")
    return _PREFIX + base64.b64encode(raw).decode()


class Verifier:
    """Checks webhooks against our keys, the current one first; during a rotation there are two."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Raises `SettingsError` when there is no key, or an unusable one."""
        if not keys:
            raise SettingsError(
                "ANTHROPIC_WEBHOOK_SIGNING_KEY is not set: without it nothing tells a webhook from a stranger"
            )
        self._keys = [normalise_key(key) for key in keys]
        # The SDK offers its check on a client only. This one opens no connection, so there is nothing to close.
        self._webhooks = AsyncAnthropic(auth_token="unused", base_url="http://unused.invalid").beta.webhooks  # noqa: S106

    def verify(self, body: bytes, headers: Mapping[str, str]) -> WebhookEvent:
        """The event in `body`, signed by one of our keys less than five minutes ago. Raises `WebhookRejected`.

        `headers` has lower-case names.
        """
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise WebhookRejected("the body is not UTF-8") from None
        for key in self._keys:
            try:
                event = self._webhooks.unwrap(text, headers=headers, key=key)
            except (WebhookVerificationError, ValueError):  # binascii.Error and JSONDecodeError are ValueErrors
                continue
            except RecursionError:
                raise WebhookRejected("the body is nested too deeply") from None
            data = getattr(event, "data", None)
            return WebhookEvent(
                id=str(getattr(event, "id", "")),
                type=str(getattr(data, "type", "")),
                session_id=str(getattr(data, "id", "")),
            )
        raise WebhookRejected("no key of ours signed this, or it is stale")
